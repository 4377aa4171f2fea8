// The random elementwise family on raw pointers, for CUDA and for its emulation on the CPU: kernels
// of an op, Op, that its header elementwise/<op>.h describes.
//
// Reads x and writes y, nothing else: 2 * sizeof(T) bytes an element (4 B in bf16, 8 B in fp32), in
// the forward as in the backward. A residual adds sizeof(T). Without kReadsDropped a dropped
// element of x need not be read. A layer scale stays in the caches. Draws are never stored: the
// backward draws them again from rng_state.
//
// Layout: x, y and the residual share one dense layout and are walked in storage order. A thread
// draws one group, for eight elements (four, where a draw is of 32 bits); a warp's 32 groups cover
// 256 consecutive elements, which its lanes load and store 16 bytes each, side by side. In fp32 and
// fp64 a group spans several of those vectors, so a lane's vector belongs to a group that another
// lane drew: its draws come by shuffle. Where a vector spans several groups, its lane draws each.
#pragma once

#include <algorithm>
#include <type_traits>

#include "reg_kernels/elementwise.h"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/rng_state.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kElementwiseThreads = 256;
// Loads of a thread before its first use of one. With four of 16 bytes each, registers are spilled.
template <typename T>
constexpr int kVectorsInFlight = sizeof(T) == 1 ? 2 : 4;
// Blocks that a multiprocessor is to hold. Without this bound the 16-bit kernels take 105 registers
// and leave room for two blocks. Bound to four, dropout's take 64 and spill nothing; bound to five,
// they spill. Kernels with a residual, or whose draws are numbers, spill when bound to four.
template <typename Op>
constexpr int kElementwiseBlocks = kMultiplies<Op> ? 4 : 3;

// The op's number as a kernel argument: a value, or a pointer where a compiled program holds the
// number on the device, so that a new number needs no new program.
struct RateArgument {
  const double* number_on_device;  // or null: then `value`
  DropoutRate value;

  RateArgument(DropoutRate value) : number_on_device(nullptr), value(value) {}
  explicit RateArgument(const double* on_device) : number_on_device(on_device), value{} {}

  template <typename Op>
  __device__ DropoutRate read() const {
    return number_on_device ? rate_of<Op>(*number_on_device) : value;
  }
};

// An op's options as a kernel argument.
template <int kCount>
struct OptionValues {
  double at[kCount];

  explicit OptionValues(const double* options) { std::copy_n(options, kCount, at); }
  __device__ const double* data() const { return at; }
};
template <>
struct OptionValues<0> {
  explicit OptionValues(const double*) {}
  __device__ const double* data() const { return nullptr; }
};

// What comes beside x, as a kernel argument: the options and, where the op adds one, a residual and
// perhaps a layer scale.
template <typename Op, typename T>
struct Beside {
  OptionValues<Op::Options::kCount> options;

  Beside(const T*, const double* options) : options(options) {}

  __device__ bool whole(const Span<const T>&, int64_t, int64_t) const { return true; }
};

template <typename Op, typename T>
  requires Op::kAdds
struct Beside<Op, T> {
  const T* residual;  // or null
  OptionValues<Op::Options::kCount> options;
  LayerScale layer_scale;

  Beside(const T* residual, const double* options, const LayerScale& layer_scale = {})
      : residual(residual), options(options), layer_scale(layer_scale) {}

  __device__ Span<const T> like(const Span<const T>& x) const { return {residual, x.begin, x.end}; }

  __device__ bool whole(const Span<const T>& x, int64_t first, int64_t last) const {
    return residual == nullptr || like(x).whole(first, last);
  }
};

template <typename Op, typename T>
__device__ __forceinline__ factor_t<Op, T> factor_of(const DropoutRate& rate,
                                                     const Beside<Op, T>& beside) {
  return FactorOf<Op, T>::from(rate.scale, beside.options.data());
}

// The draws of kCount elements that lie side by side: a bit each where the op keeps or
// drops.
template <typename Draw, int kCount>
struct Drawn {
  static constexpr int kBits = 8 * sizeof(Draw), kEach = 32 / kBits;
  uint32_t w[kCount / kEach];

  __device__ Draw operator[](int j) const {
    return static_cast<Draw>(w[j / kEach] >> j % kEach * kBits);
  }

  // The same, of a whole group, for a j that is known only at run time. w[j] would put w in memory.
  __device__ uint32_t pick(uint32_t j) const {
    static_assert(kCount * sizeof(Draw) == sizeof(PhiloxWords), "these are a group's");
    const uint32_t i = j / kEach;
    const uint32_t low = i & 1u ? w[1] : w[0], high = i & 1u ? w[3] : w[2];
    return static_cast<Draw>((i & 2u ? high : low) >> j % kEach * kBits);
  }

  __device__ void add(int j, uint32_t draw) { w[j / kEach] |= draw << j % kEach * kBits; }
};
template <int kCount>
struct Drawn<bool, kCount> {
  uint32_t bits;

  __device__ bool operator[](int j) const { return bits >> j & 1u; }
  __device__ uint32_t pick(uint32_t j) const { return bits >> j & 1u; }
  __device__ void add(int j, uint32_t draw) { bits |= draw << j; }
};

template <typename Op>
constexpr int kDrawsAGroup = sizeof(PhiloxWords) / sizeof(drawn_t<Op>);
// What is kept of draws until an element's turn: a bool or bits.
template <typename Op>
using kept_t = std::conditional_t<kKeepsOrDrops<Op>, bool, drawn_t<Op>>;
template <typename Op>
using DrawnGroup = Drawn<kept_t<Op>, kDrawsAGroup<Op>>;

template <typename Op>
__device__ __forceinline__ typename Op::Draw draw_of(kept_t<Op> kept) {
  if constexpr (kDrawsNormals<Op>)
    return {bit_cast<float>(kept)};
  else
    return kept;
}

template <typename Op>
__device__ __forceinline__ DrawnGroup<Op> draw_group(const RngStream& stream, uint64_t group,
                                                     uint32_t threshold) {
  const PhiloxWords words = stream(group);
  if constexpr (kKeepsOrDrops<Op>) {
    return {keep_bits(words, threshold)};
  } else if constexpr (kDrawsNormals<Op>) {
    const NormalPair<OneLane> pairs[] = {normal_pair<OneLane>(words.w[0], words.w[1]),
                                         normal_pair<OneLane>(words.w[2], words.w[3])};
    return bit_cast<DrawnGroup<Op>>(pairs);
  } else {
    return bit_cast<DrawnGroup<Op>>(words);
  }
}

template <typename T>
constexpr int kElementsABlock = kElementwiseThreads * kVectorsInFlight<T> * kVector<T>;

// The draws of this lane's vector k, of the kVectors that a group spans. Another lane may have
// drawn them.
template <int kVectors, typename Draw, int kGroupCount>
__device__ __forceinline__ Drawn<Draw, kGroupCount / kVectors> of_vector(
    const Drawn<Draw, kGroupCount>& group, int k, int lane) {
  constexpr int kCount = kGroupCount / kVectors;
  if constexpr (kVectors == 1) {
    return group;
  } else {
    const int source = (k * kWarp + lane) / kVectors, part = lane % kVectors;
    if constexpr (sizeof(Draw) == 1) {
      return {__shfl_sync(kFullWarp, group.bits, source) >> part * kCount};
    } else {
      Drawn<Draw, kCount> result;
      constexpr int kWords = sizeof(result) / sizeof(uint32_t);
      RK_UNROLL
      for (int i = 0; i < kVectors * kWords; ++i) {
        const uint32_t word = __shfl_sync(kFullWarp, group.w[i], source);
        if (i / kWords == 0 || i / kWords == part) result.w[i % kWords] = word;
      }
      return result;
    }
  }
}

// Applies the op to `vector`: the elements of x from `first` on. Element j is told factors(j).
template <typename Op, bool kWhole, typename T, typename Factors>
__device__ __forceinline__ void map_vector(const Span<const T>& x, int64_t first, Vector<T>& vector,
                                           const Drawn<kept_t<Op>, kVector<T>>& drawn,
                                           const Factors& factors, const Beside<Op, T>& beside) {
  if constexpr (Op::kAdds) {
    if (beside.residual != nullptr) {
      const Vector<T> residual = load_vector<kWhole>(beside.like(x), first);
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        vector.v[j] = element_of<Op>(vector.v[j], draw_of<Op>(drawn[j]), factors(j), residual.v[j]);
      }
      return;
    }
  }
  RK_UNROLL
  for (int j = 0; j < kVector<T>; ++j) {
    vector.v[j] = element_of<Op>(vector.v[j], draw_of<Op>(drawn[j]), factors(j));
  }
}

// The work of one thread; `block` is its block's first element.
template <typename Op, bool kWhole, typename T>
__device__ __forceinline__ void elements_block(const Span<const T>& x, const Span<T>& y,
                                               int64_t block, uint64_t first_group,
                                               const DropoutRate& rate, const RngStream& stream,
                                               const Beside<Op, T>& beside) {
  constexpr int kDraws = kDrawsAGroup<Op>;
  constexpr int kVectors = kDraws > kVector<T> ? kDraws / kVector<T> : 1;  // vectors a group
  constexpr int kGroups = kDraws < kVector<T> ? kVector<T> / kDraws : 1;   // groups a vector
  constexpr int kSteps = kVectorsInFlight<T> / kVectors;  // times that a thread draws
  const factor_t<Op, T> factor = factor_of(rate, beside);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp_step = block / (kVectors * kVector<T>)+threadIdx.x / kWarp * (kSteps * kWarp);

  const auto element = [&](int v) {  // the first one of this thread's vector v
    return (warp_step * kVectors + v * kWarp + lane) * kVector<T>;
  };
  Vector<T> vectors[kVectorsInFlight<T>];
  RK_UNROLL
  for (int v = 0; v < kVectorsInFlight<T>; ++v) vectors[v] = load_vector<kWhole>(x, element(v));

  RK_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const uint64_t group =
        first_group + warp_step * kGroups + step * kWarp * kGroups + lane * kGroups;
    Drawn<kept_t<Op>, kDraws * kGroups> drawn;
    if constexpr (kGroups == 1) {
      drawn = draw_group<Op>(stream, group, rate.threshold);
    } else {
      DrawnGroup<Op> groups[kGroups];
      RK_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        groups[g] = draw_group<Op>(stream, group + g, rate.threshold);
      }
      drawn = bit_cast<Drawn<kept_t<Op>, kDraws * kGroups>>(groups);
    }
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int v = step * kVectors + k;
      const auto draws = of_vector<kVectors>(drawn, k, lane);
      map_vector<Op, kWhole>(x, element(v), vectors[v], draws, [&](int) { return factor; }, beside);
      store_vector<kWhole>(y, element(v), vectors[v]);
    }
  }
}

template <typename Op, typename T>
__global__ void __launch_bounds__(kElementwiseThreads, kElementwiseBlocks<Op>)
    elements_kernel(Span<const T> x, Span<T> y, uint64_t first_group, RateArgument rate_argument,
                    RngState rng, Beside<Op, T> beside) {
  const DropoutRate rate = rate_argument.read<Op>();
  const RngStream stream = rng.stream(Op::kTag);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kElementsABlock<T>;
  const int64_t next = block + kElementsABlock<T>;
  if (x.whole(block, next) && y.whole(block, next) && beside.whole(x, block, next)) {
    elements_block<Op, true>(x, y, block, first_group, rate, stream, beside);
  } else {
    elements_block<Op, false>(x, y, block, first_group, rate, stream, beside);
  }
}

// The draws of a vector's elements, from `first` on: each element has its channel's draw. Mostly
// the whole vector needs one group: it lies in one channel or, with the channels last, in channels
// of one group.
template <typename Op, typename T, typename Index>
__device__ __forceinline__ Drawn<kept_t<Op>, kVector<T>> draws_of_channels(
    const ChannelLayout& layout, Index first, uint64_t mask_offset, uint32_t threshold,
    const RngStream& stream) {
  constexpr uint32_t kDraws = kDrawsAGroup<Op>;
  ChannelCursor<Index> cursor(layout, first);
  uint64_t mask_index = mask_offset + cursor.mask_index();
  DrawnGroup<Op> drawn = draw_group<Op>(stream, mask_index / kDraws, threshold);
  const auto position = static_cast<uint32_t>(mask_index % kDraws);
  if constexpr (kKeepsOrDrops<Op>) {
    if (cursor.run() >= kVector<T>) {
      if (!layout.channels_last) return {drawn.pick(position) ? ~0u : 0u};
      if (position + kVector<T> <= kDraws) return {drawn.bits >> position};
    }
  }
  Drawn<kept_t<Op>, kVector<T>> result{};
  uint64_t drawn_group = mask_index / kDraws;
  [[maybe_unused]] constexpr int kTimes =
      kKeepsOrDrops<Op> ? 1 : kVector<T>;  // draws in words need a j that the compiler knows
  RK_UNROLL_BY(kTimes)
  for (int j = 0; j < kVector<T>; ++j) {
    mask_index = mask_offset + cursor.mask_index();
    if (mask_index / kDraws != drawn_group) {
      drawn_group = mask_index / kDraws;
      drawn = draw_group<Op>(stream, drawn_group, threshold);
    }
    result.add(j, drawn.pick(static_cast<uint32_t>(mask_index % kDraws)));
    cursor.advance();
  }
  return result;
}

// One thread a vector. With a layer scale it is a kernel of its own: the others need fewer
// registers.
template <typename Op, typename T, typename Index, bool kScales>
__global__ void __launch_bounds__(kElementwiseThreads)
    channels_kernel(Span<const T> x, Span<T> y, ChannelLayout layout, uint64_t mask_offset,
                    RateArgument rate_argument, RngState rng, Beside<Op, T> beside) {
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * kVector<T>;
  if (first >= x.end) return;
  Vector<T> vector{};
  if constexpr (!kSkipsDropped<Op>) vector = load_vector<false>(x, first);
  const DropoutRate rate = rate_argument.read<Op>();
  const factor_t<Op, T> factor = factor_of(rate, beside);
  const auto drawn = draws_of_channels<Op, T>(layout, static_cast<Index>(first), mask_offset,
                                              rate.threshold, rng.stream(Op::kTag));
  if constexpr (kSkipsDropped<Op>) {
    if ((drawn.bits & ((1u << kVector<T>)-1u)) != 0) vector = load_vector<false>(x, first);
  }
  if constexpr (kScales) {
    FactorCursor<compute_t<T>, Index> cursor(beside.layer_scale, static_cast<Index>(first));
    compute_t<T> factors[kVector<T>];
    RK_UNROLL
    for (int j = 0; j < kVector<T>; ++j) {
      factors[j] = *cursor.values() * factor;
      cursor.advance(1);
    }
    map_vector<Op, false>(x, first, vector, drawn, [&](int j) { return factors[j]; }, beside);
  } else {
    map_vector<Op, false>(x, first, vector, drawn, [&](int) { return factor; }, beside);
  }
  store_vector<false>(y, first, vector);
}

// Computes y[i] from x[i] and draw element_offset + i, for i < numel in storage order; y may be x.
template <typename Op, typename T>
void launch_elements(const T* x, T* y, const Beside<Op, T>& beside, int64_t numel,
                     int64_t element_offset, RateArgument rate, RngState rng, cudaStream_t stream) {
  if constexpr (has_form<Op>(DrawnFor::element)) {
    if (numel == 0) return;
    // Elements are counted from the start of the group that the first one falls in.
    const int64_t lead = element_offset % kDrawsAGroup<Op>;
    const Span<const T> in{x, lead, lead + numel};
    const Span<T> out{y, lead, lead + numel};
    const dim3 grid(static_cast<unsigned>(ceil_div(lead + numel, kElementsABlock<T>)));
    const auto kernel = elements_kernel<Op, T>;
    RK_LAUNCH(kernel, grid, dim3(kElementwiseThreads), 0, stream, in, out,
              static_cast<uint64_t>(element_offset / kDrawsAGroup<Op>), rate, rng, beside);
    check_launch(Op::kForms[0].name);
  }
}

// The same with draw mask_offset + n * C + c, where (n, c) is the channel of element i in the
// (N, C, L) tensor.
template <typename Op, typename T>
void launch_channels(const T* x, T* y, const Beside<Op, T>& beside, int64_t numel,
                     ChannelLayout layout, int64_t mask_offset, RateArgument rate, RngState rng,
                     cudaStream_t stream) {
  if constexpr (has_form<Op>(DrawnFor::channel) || has_form<Op>(DrawnFor::sample)) {
    if (numel == 0) return;
    const Span<const T> in{x, 0, numel};
    const Span<T> out{y, 0, numel};
    const dim3 grid(static_cast<unsigned>(ceil_div(numel, kElementwiseThreads * kVector<T>)));
    // The last vector may reach past numel, so the narrow index stops short of its own limit.
    const bool narrow = numel < (int64_t{1} << 31);
    auto kernel =
        narrow ? channels_kernel<Op, T, uint32_t, false> : channels_kernel<Op, T, uint64_t, false>;
    if constexpr (kScalesChannels<Op>) {
      if (beside.layer_scale.values != nullptr) {
        kernel = narrow ? channels_kernel<Op, T, uint32_t, true>
                        : channels_kernel<Op, T, uint64_t, true>;
      }
    }
    RK_LAUNCH(kernel, grid, dim3(kElementwiseThreads), 0, stream, in, out, layout,
              static_cast<uint64_t>(mask_offset), rate, rng, beside);
    check_launch(Op::kForms[0].name);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
