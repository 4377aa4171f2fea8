// The random elementwise family on raw pointers, for CUDA and for its emulation on the CPU: kernels
// of an op, Op, that its header elementwise/<op>.h describes.
//
// Reads x, writes y, nothing else: 2 * sizeof(T) bytes an element (4 B in bf16, 8 B in fp32),
// forward and backward alike; one more with a residual, and of what is dropped x is not read where
// the op says so. The mask is drawn again from rng_state, never stored.
//
// Layout: x, y and the residual share one dense layout and are walked in storage order. A thread
// draws one group of eight mask elements; a warp's 32 groups cover 256 consecutive elements, which
// its lanes load and store 16 bytes each, side by side. In fp32 and fp64 a group spans several of
// those vectors, so a lane's vector belongs to a group that another lane drew: the eight keep bits
// come by shuffle.
#pragma once

#include "reg_kernels/elementwise.h"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/rng_state.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kElementwiseThreads = 256;
constexpr int kVectorsInFlight = 4;  // loads of a thread before its first use of one
// Blocks a multiprocessor. Left alone, the 16-bit kernels take 105 registers and leave room for two
// blocks; held to four they take 64 and spill nothing (five spills).
constexpr int kElementwiseBlocks = 4;

// The rate as a kernel argument: by value, or as the probability itself where a compiled program
// holds that on the device, so that a new p needs no new program.
struct RateArgument {
  const double* p_on_device;  // or null: then `value`
  DropoutRate value;

  RateArgument(DropoutRate value) : p_on_device(nullptr), value(value) {}
  explicit RateArgument(const double* p_on_device) : p_on_device(p_on_device), value{} {}

  __device__ DropoutRate read() const {
    return p_on_device ? DropoutRate::from_probability(*p_on_device) : value;
  }
};

// What is added to x m, as a kernel argument: nothing, unless the op adds a residual.
template <typename Op, typename T>
struct Addend {
  Addend(const T*, bool) {}
};

template <typename Op, typename T>
  requires Op::kAdds
struct Addend<Op, T> {
  const T* residual;  // or null
  bool scaled;        // whether what is kept is scaled up

  Addend(const T* residual, bool scaled) : residual(residual), scaled(scaled) {}
};

template <typename T>
constexpr int kElementsABlock = kElementwiseThreads * kVectorsInFlight * kVector<T>;

// The work of one thread; `block` is its block's first element.
template <typename Op, bool kWhole, typename T>
__device__ __forceinline__ void elements_block(const Span<const T>& x, const Span<T>& y,
                                               int64_t block, uint64_t first_group,
                                               const DropoutRate& rate, const RngStream& stream) {
  constexpr int kVectors = kGroup / kVector<T>;        // vectors a group
  constexpr int kSteps = kVectorsInFlight / kVectors;  // groups a thread
  const auto scale = static_cast<compute_t<T>>(rate.scale);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp_group = block / kGroup + threadIdx.x / kWarp * (kSteps * kWarp);

  const auto element = [&](int v) {  // the first one of this thread's vector v
    return (warp_group * kVectors + v * kWarp + lane) * kVector<T>;
  };
  Vector<T> vectors[kVectorsInFlight];
  RK_UNROLL
  for (int v = 0; v < kVectorsInFlight; ++v) vectors[v] = load_vector<kWhole>(x, element(v));

  RK_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const uint64_t group = first_group + warp_group + step * kWarp + lane;
    const uint32_t drawn = keep_bits(stream(group), rate.threshold);
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      uint32_t keep = drawn;
      if constexpr (kVectors > 1) {
        keep = __shfl_sync(kFullWarp, drawn, (k * kWarp + lane) / kVectors);
        keep >>= lane % kVectors * kVector<T>;
      }
      Vector<T>& vector = vectors[step * kVectors + k];
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        vector.v[j] = Op::element(vector.v[j], keep >> j & 1u ? scale : compute_t<T>(0));
      }
      store_vector<kWhole>(y, element(step * kVectors + k), vector);
    }
  }
}

template <typename Op, typename T>
__global__ void __launch_bounds__(kElementwiseThreads, kElementwiseBlocks)
    elements_kernel(Span<const T> x, Span<T> y, uint64_t first_group, RateArgument rate_argument,
                    RngState rng) {
  const DropoutRate rate = rate_argument.read();
  const RngStream stream = rng.stream(Op::kTag);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kElementsABlock<T>;
  const int64_t next = block + kElementsABlock<T>;
  if (x.whole(block, next) && y.whole(block, next)) {
    elements_block<Op, true>(x, y, block, first_group, rate, stream);
  } else {
    elements_block<Op, false>(x, y, block, first_group, rate, stream);
  }
}

// Bit j is set when element first + j keeps. Mostly one draw serves the whole vector: it lies in
// one channel, or, with the channels last, in one group of them.
template <typename T, typename Index>
__device__ __forceinline__ uint32_t channel_keep_bits(const ChannelLayout& layout, Index first,
                                                      uint64_t mask_offset, uint32_t threshold,
                                                      const RngStream& stream) {
  ChannelCursor<Index> cursor(layout, first);
  uint64_t mask_index = mask_offset + cursor.mask_index();
  uint32_t drawn = keep_bits(stream(mask_index / kGroup), threshold);
  const auto position = static_cast<uint32_t>(mask_index % kGroup);
  if (cursor.run() >= kVector<T>) {
    if (!layout.channels_last) return drawn >> position & 1u ? ~0u : 0u;
    if (position + kVector<T> <= kGroup) return drawn >> position;
  }
  uint32_t keep = 0;
  uint64_t drawn_group = mask_index / kGroup;
  RK_NO_UNROLL
  for (int j = 0; j < kVector<T>; ++j) {
    mask_index = mask_offset + cursor.mask_index();
    if (mask_index / kGroup != drawn_group) {
      drawn_group = mask_index / kGroup;
      drawn = keep_bits(stream(drawn_group), threshold);
    }
    keep |= (drawn >> (mask_index % kGroup) & 1u) << j;
    cursor.advance();
  }
  return keep;
}

// One thread a vector.
template <typename Op, typename T, typename Index>
__global__ void __launch_bounds__(kElementwiseThreads)
    channels_kernel(Span<const T> x, Span<T> y, ChannelLayout layout, uint64_t mask_offset,
                    RateArgument rate_argument, RngState rng, Addend<Op, T> addend) {
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * kVector<T>;
  if (first >= x.end) return;
  Vector<T> vector{};
  if constexpr (Op::kReadsDropped) vector = load_vector<false>(x, first);
  const DropoutRate rate = rate_argument.read();
  auto scale = static_cast<compute_t<T>>(rate.scale);
  const uint32_t keep = channel_keep_bits<T>(layout, static_cast<Index>(first), mask_offset,
                                             rate.threshold, rng.stream(Op::kTag));
  if constexpr (Op::kReadsDropped) {
    RK_UNROLL
    for (int j = 0; j < kVector<T>; ++j) {
      vector.v[j] = Op::element(vector.v[j], keep >> j & 1u ? scale : compute_t<T>(0));
    }
  } else {
    static_assert(Op::kAdds, "what is not read leaves a residual, or 0");
    if (!addend.scaled) scale = 1;
    if ((keep & ((1u << kVector<T>)-1u)) != 0) vector = load_vector<false>(x, first);
    Vector<T> result{};
    if (addend.residual != nullptr) {
      result = load_vector<false>(Span<const T>{addend.residual, x.begin, x.end}, first);
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        if (keep >> j & 1u) result.v[j] = Op::element(vector.v[j], result.v[j], scale);
      }
    } else {
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        if (keep >> j & 1u) result.v[j] = Op::element(vector.v[j], scale);
      }
    }
    vector = result;
  }
  store_vector<false>(y, first, vector);
}

// y[i] = x[i] * mask(element_offset + i) for i < numel, in storage order; y may be x.
template <typename Op, typename T>
void launch_elements(const T* x, T* y, const Addend<Op, T>&, int64_t numel, int64_t element_offset,
                     RateArgument rate, RngState rng, cudaStream_t stream) {
  if constexpr (has_form<Op>(DrawnFor::element)) {
    static_assert(!Op::kAdds && Op::kReadsDropped, "no op needs a residual for each draw yet");
    if (numel == 0) return;
    // Elements are counted from the start of the group that the first one falls in.
    const int64_t lead = element_offset % kGroup;
    const Span<const T> in{x, lead, lead + numel};
    const Span<T> out{y, lead, lead + numel};
    const dim3 grid(static_cast<unsigned>(ceil_div(lead + numel, kElementsABlock<T>)));
    const auto kernel = elements_kernel<Op, T>;
    RK_LAUNCH(kernel, grid, dim3(kElementwiseThreads), 0, stream, in, out,
              static_cast<uint64_t>(element_offset / kGroup), rate, rng);
    check_launch(Op::kForms[0].name);
  }
}

// The same for i < numel of mask(mask_offset + n * C + c), (n, c) the channel that element i of the
// (N, C, L) tensor lies in, with what is added; y may be x.
template <typename Op, typename T>
void launch_channels(const T* x, T* y, const Addend<Op, T>& addend, int64_t numel,
                     ChannelLayout layout, int64_t mask_offset, RateArgument rate, RngState rng,
                     cudaStream_t stream) {
  if (numel == 0) return;
  const Span<const T> in{x, 0, numel};
  const Span<T> out{y, 0, numel};
  const dim3 grid(static_cast<unsigned>(ceil_div(numel, kElementwiseThreads * kVector<T>)));
  // The last vector may reach past numel, so the narrow index stops short of its own limit.
  const auto kernel = numel < (int64_t{1} << 31) ? channels_kernel<Op, T, uint32_t>
                                                 : channels_kernel<Op, T, uint64_t>;
  RK_LAUNCH(kernel, grid, dim3(kElementwiseThreads), 0, stream, in, out, layout,
            static_cast<uint64_t>(mask_offset), rate, rng, addend);
  check_launch(Op::kForms[0].name);
}

}  // namespace cuda
RK_NAMESPACE_END
