// Adversarial steps on raw pointers, for CUDA and for its emulation on the CPU.
//
// A step reads adv, grad and clean, and writes adv: 4 sizeof(T) bytes an element. In L-infinity
// blocks take tiles of the samples. In L1 and L2 a block takes a whole sample and goes over it
// several times before: once over the gradient, for its norm, then over all three, for the norm of
// what leads away from clean, in L1 until the threshold is found. A sample of an image fits in L2.
// Sums are made in an order that depends on sizes alone, and nothing waits on the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "reg_kernels/adversarial_step_math.h"
#include "reg_kernels/channel_layout.h"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/reduce.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kAdversarialThreads = 256;  // of a tile
constexpr int kBallThreads = 512;         // of a sample
constexpr int kAdversarialLoads = 2;      // vectors of a thread before its first use of one

template <typename T>
struct AdversarialStep {
  using C = compute_t<T>;

  T* adv;  // (N, C, L), as `layout` says
  const T *grad, *clean;
  int64_t samples;
  ChannelLayout layout;
  SampleNumbers step_sizes, eps;
  C lower, upper;     // where there are no channels
  const C* channels;  // ChannelNumbers' four, (4, C), or null

  __device__ int64_t numel() const { return layout.channels * layout.length; }  // of a sample

  __device__ SampleMove move_of(int64_t n) const {
    return SampleMove::of(step_sizes.at(n), eps.at(n));
  }
};

// The channel of each element of a vector, and its numbers.
template <typename T>
struct ChannelWalk {
  using C = compute_t<T>;

  const AdversarialStep<T>& a;
  int64_t channel;
  ChannelNumbers<C> numbers;

  // From element i of a sample on.
  __device__ ChannelWalk(const AdversarialStep<T>& a, int64_t i)
      : a(a), channel(0), numbers{C(1), C(1), a.lower, a.upper} {
    if (!a.channels) return;
    const auto at = static_cast<uint64_t>(i);
    const auto channels = static_cast<uint64_t>(a.layout.channels);
    const auto length = static_cast<uint64_t>(a.layout.length);
    channel = static_cast<int64_t>(a.layout.channels_last ? at % channels : at / length);
    read();
  }

  // To the next element of a vector, which is of one channel but where they come last.
  __device__ void advance() {
    if (!a.channels || !a.layout.channels_last) return;
    channel = channel + 1 == a.layout.channels ? 0 : channel + 1;
    read();
  }

 private:
  __device__ void read() {
    const C* const of = a.channels + channel;
    const int64_t count = a.layout.channels;
    numbers = {of[0], of[count], of[2 * count], of[3 * count]};
  }
};

template <typename T, int kCount>
struct AdversarialVectors {
  Vector<T, kCount> adv, grad, clean;

  // Of element i of the batch on.
  __device__ void load_at(const AdversarialStep<T>& a, int64_t i) {
    adv = load_whole<kCount>(a.adv + i);
    grad = load_whole<kCount>(a.grad + i);
    clean = load_whole<kCount>(a.clean + i);
  }
};

// adv = what f(adv, grad, clean, clean as it is stored, numbers) makes of each element.
template <int kCount, typename T, typename F>
__device__ __forceinline__ void step_vector(const AdversarialStep<T>& a,
                                            AdversarialVectors<T, kCount>& v, int64_t n, int64_t i,
                                            const F& f) {
  ChannelWalk<T> walk(a, i);
  RK_UNROLL
  for (int j = 0; j < kCount; ++j) {
    v.adv.v[j] =
        f(load(v.adv.v[j]), load(v.grad.v[j]), load(v.clean.v[j]), v.clean.v[j], walk.numbers);
    if (j + 1 < kCount) walk.advance();
  }
  store_whole(a.adv + n * a.numel() + i, v.adv);
}

template <int kCount, typename T>
__device__ __forceinline__ void linf_tile(const AdversarialStep<T>& a, int64_t n, int64_t first) {
  using C = compute_t<T>;
  const int64_t numel = a.numel();
  const int64_t begin = first + static_cast<int64_t>(threadIdx.x) * kCount;
  constexpr int64_t kStride = kAdversarialThreads * kCount;
  AdversarialVectors<T, kCount> v[kAdversarialLoads];
  RK_UNROLL
  for (int k = 0; k < kAdversarialLoads; ++k) {
    if (begin + k * kStride < numel) v[k].load_at(a, n * numel + begin + k * kStride);
  }
  const SampleMove move = a.move_of(n);
  const C length = static_cast<C>(move.length), eps = static_cast<C>(move.eps);
  RK_UNROLL
  for (int k = 0; k < kAdversarialLoads; ++k) {
    if (begin + k * kStride >= numel) continue;
    step_vector(a, v[k], n, begin + k * kStride,
                [&](C adv, C grad, C clean, T stored, const ChannelNumbers<C>& of) {
                  const C reach = eps * of.inverse;
                  const C y =
                      linf_step(adv, grad, clean, length * of.inverse, reach, of.lower, of.upper);
                  return store_within<T>(y, stored, reach, true);
                });
  }
}

template <typename T>
__global__ void __launch_bounds__(kAdversarialThreads)
    adversarial_linf_kernel(const __grid_constant__ AdversarialStep<T> a, bool whole,
                            int64_t tiles) {
  constexpr int kCount = kVector<T>;
  constexpr int64_t kTile = kAdversarialThreads * kAdversarialLoads;
  for (int64_t task = blockIdx.x; task < tiles * a.samples; task += gridDim.x) {
    const int64_t n = task / tiles, tile = task - n * tiles;
    if (whole) {
      linf_tile<kCount>(a, n, tile * kTile * kCount);
    } else {
      linf_tile<1>(a, n, tile * kTile);
    }
  }
}

struct BallShared {
  Sums scratch[kBallThreads / kWarp];
  Sums total;
};

// The total of what threads bring, for all of them.
__device__ __forceinline__ Sums ball_sum(const Sums& mine, BallShared* shared) {
  Sums sums[1] = {mine};
  const Sums total = block_sum(sums, 1, shared->scratch);
  if (threadIdx.x == 0) shared->total = total;
  __syncthreads();
  return shared->total;  // the next one is written behind a barrier of its own
}

// Calls f(i) for the vectors that this thread has of a sample: from element i on.
template <int kCount, typename T, typename F>
__device__ __forceinline__ void for_vectors(const AdversarialStep<T>& a, const F& f) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kCount; i < a.numel();
       i += int64_t{kBallThreads} * kCount) {
    f(i);
  }
}

template <BallNorm kNorm, typename C>
__device__ __forceinline__ void add_counted(Sums& sums, C value, C threshold) {
  const auto wide = static_cast<double>(counted<kNorm>(value, threshold));
  sums.a += kNorm == BallNorm::l2 ? wide * wide : wide;
  sums.b += wide > 0 ? 1 : 0;
}

template <BallNorm kNorm, int kCount, typename T>
__device__ __forceinline__ Sums sum_of_displacements(const AdversarialStep<T>& a, int64_t n,
                                                     const SampleMove& move, BallShared* shared) {
  using C = compute_t<T>;
  const C length = static_cast<C>(move.length), threshold = static_cast<C>(move.threshold);
  Sums mine{};
  for_vectors<kCount>(a, [&](int64_t i) {
    AdversarialVectors<T, kCount> v;
    v.load_at(a, n * a.numel() + i);
    ChannelWalk<T> walk(a, i);
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const C way = displacement(load(v.adv.v[j]), load(v.grad.v[j]), load(v.clean.v[j]), length,
                                 walk.numbers);
      add_counted<kNorm>(mine, way, threshold);
      if (j + 1 < kCount) walk.advance();
    }
  });
  return ball_sum(mine, shared);
}

template <BallNorm kNorm, int kCount, typename T>
__device__ __forceinline__ void ball_sample(const AdversarialStep<T>& a, int64_t n,
                                            BallShared* shared) {
  using C = compute_t<T>;
  SampleMove move = a.move_of(n);
  Sums mine{};
  for_vectors<kCount>(a, [&](int64_t i) {
    const auto grad = load_whole<kCount>(a.grad + n * a.numel() + i);
    ChannelWalk<T> walk(a, i);
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      add_counted<kNorm>(mine, pixel_gradient(load(grad.v[j]), walk.numbers.inverse), C(0));
      if (j + 1 < kCount) walk.advance();
    }
  });
  const double norm = ball_sum(mine, shared).a;
  move.set_gradient(kNorm == BallNorm::l2 ? std::sqrt(norm) : norm);
  if constexpr (kNorm == BallNorm::l2) {
    move.shorten(std::sqrt(sum_of_displacements<kNorm, kCount>(a, n, move, shared).a));
  } else {
    int64_t count = 0;
    for (bool found = false; !found;) {
      const Sums sums = sum_of_displacements<kNorm, kCount>(a, n, move, shared);
      const auto above = static_cast<int64_t>(sums.b);
      found = move.shrink(sums.a, above, count);
      count = above;
    }
  }
  const auto own = BallMove<C>::of(move);
  for_vectors<kCount>(a, [&](int64_t i) {
    AdversarialVectors<T, kCount> v;
    v.load_at(a, n * a.numel() + i);
    step_vector(a, v, n, i, [&](C adv, C grad, C clean, T stored, const ChannelNumbers<C>& of) {
      constexpr BroughtBack kBack =
          kNorm == BallNorm::l2 ? BroughtBack::by_factor : BroughtBack::by_threshold;
      const C y = own.inside ? ball_step<BroughtBack::not_at_all>(adv, grad, clean, own, of)
                             : ball_step<kBack>(adv, grad, clean, own, of);
      return store_within<T>(y, stored, C(0), false);
    });
  });
}

template <BallNorm kNorm, typename T>
__global__ void __launch_bounds__(kBallThreads, 1)
    adversarial_ball_kernel(const __grid_constant__ AdversarialStep<T> a, bool whole) {
  RK_SHARED(BallShared, shared);
  for (int64_t n = blockIdx.x; n < a.samples; n += gridDim.x) {
    if (whole) {
      ball_sample<kNorm, kVector<T>>(a, n, shared);
    } else {
      ball_sample<kNorm, 1>(a, n, shared);
    }
  }
}

// One step of all samples.
template <typename T>
void launch_adversarial_step(const AdversarialStep<T>& a, BallNorm norm, cudaStream_t stream,
                             int64_t most_blocks = 0x7fffffff) {
  const int64_t numel = a.layout.channels * a.layout.length;
  if (a.samples == 0 || numel == 0) return;
  constexpr int kCount = kVector<T>;
  const auto is_aligned = [](const T* data) {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  };
  const bool in_planes = a.channels && !a.layout.channels_last;
  const bool whole = (in_planes ? a.layout.length : numel) % kCount == 0 && is_aligned(a.adv) &&
                     is_aligned(a.grad) && is_aligned(a.clean);
  const auto grid = [&](int64_t blocks) {
    return dim3(static_cast<unsigned>(std::min(blocks, most_blocks)));
  };
  if (norm == BallNorm::linf) {
    const int64_t tile = kAdversarialThreads * kAdversarialLoads * (whole ? kCount : 1);
    const int64_t tiles = ceil_div(numel, tile);
    RK_LAUNCH(adversarial_linf_kernel<T>, grid(tiles * a.samples), dim3(kAdversarialThreads), 0,
              stream, a, whole, tiles);
  } else {
    const auto kernel = norm == BallNorm::l1 ? adversarial_ball_kernel<BallNorm::l1, T>
                                             : adversarial_ball_kernel<BallNorm::l2, T>;
    RK_LAUNCH(kernel, grid(a.samples), dim3(kBallThreads), sizeof(BallShared), stream, a, whole);
  }
  check_launch("adversarial_step_");
}

}  // namespace cuda
RK_NAMESPACE_END
