// What BatchNorm's forward and backward share: the chain behind the affine, a channel's constants,
// masks and gates.
#pragma once

#include "reg_kernels/batch_norm_math.h"
#include "reg_kernels/channel_slices.cuh"
#include "reg_kernels/dropout_math.h"
#include "reg_kernels/reduce.cuh"
#include "reg_kernels/rng_state.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Dropout's and the activation's part, the same in both directions. A gate has one bit an element,
// element e's is bit e % 8 of byte e / 8 of the storage order; it is allocated in whole words of
// four bytes. What a bit means: batch_norm_math.h.
struct Chain {
  Activation activation;
  double slope;
  bool drops;
  DropoutRate rate;
  RngState rng;
  uint8_t* gate;        // or null
  int64_t mask_offset;  // the mask index of element 0
};

// ---- Shared memory beside what is kept: sums, and up to five constants a channel. No barrier
// parts an item's last reads of them from the next one's first writes: those come behind
// block_sum's, or go to other constants.

constexpr int kConstants = 5;
constexpr int64_t kSumsBytes = 2 * sizeof(Sums);  // a thread of a reduction

// Blocks a multiprocessor of the kernels that only map: 80 registers a thread, in double 128.
template <typename T>
constexpr int kMapBlocks = sizeof(T) == 8 ? 4 : 6;

template <typename T>
struct Scratch {
  using C = compute_t<T>;
  // An item's channels at the most, 128 bytes of them.
  static constexpr int kChannels = 128 / sizeof(T);
  static constexpr int64_t kBytes = int64_t{kConstants} * kChannels * sizeof(C);

  C* constants;  // [kConstants][kChannels]
  Sums* sums;    // of reductions, [2 blockDim.x]: kChannels a warp

  __device__ explicit Scratch(unsigned char* shared)
      : constants(reinterpret_cast<C*>(shared)), sums(reinterpret_cast<Sums*>(shared + kBytes)) {}

  // What is behind them.
  __device__ void* rest(bool reduces) const { return sums + (reduces ? 2 * blockDim.x : 0); }

  __device__ C& constant(int kind, int channel) const {
    return constants[kind * kChannels + channel];
  }
};

// How many channels a thread's vectors belong to, and which of them element j belongs to.
template <typename T, bool kChannelsLast>
constexpr int kColumns = kChannelsLast ? kVector<T> : 1;
template <bool kChannelsLast>
__device__ __forceinline__ constexpr int column(int j) {
  return kChannelsLast ? j : 0;
}

// A channel's constant of one kind, for each of the thread's columns.
template <typename T, bool kChannelsLast>
struct Columns {
  using C = compute_t<T>;
  C values[kColumns<T, kChannelsLast>];

  __device__ void read(const Scratch<T>& scratch, const ChannelPlan& plan, int kind) {
    RK_UNROLL
    for (int k = 0; k < kColumns<T, kChannelsLast>; ++k) {
      values[k] = scratch.constant(kind, first(plan) + k);
    }
  }
  __device__ C operator[](int j) const { return values[column<kChannelsLast>(j)]; }

  // The thread's first channel, counted in its item.
  static __device__ int first(const ChannelPlan& plan) {
    return kChannelsLast ? static_cast<int>(threadIdx.x) % plan.vectors * kVector<T> : 0;
  }
};

// ---- Gates and masks: the bits of a step's vectors, those of vector k in byte k.

// Whether dropout keeps each element. All lanes of a warp take part in this and in store_gate.
// Eight elements that lie in two of the mask's groups cost a second draw.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ uint32_t draw(const Slice<T, kChannelsLast>& slice, int step,
                                         bool ragged, const Chain& chain, const RngStream& stream) {
  const int64_t first = slice.own_group(step) + chain.mask_offset;
  const auto group = static_cast<uint64_t>(first / kGroup);
  const uint32_t threshold = chain.rate.threshold;
  uint32_t kept = keep_bits(stream(group), threshold);
  if ((kChannelsLast && ragged) || chain.mask_offset % kGroup != 0) {
    kept |= keep_bits(stream(group + 1), threshold) << kGroup;
    kept = kept >> first % kGroup & 0xffu;
  }
  return slice.distribute(kept);
}

// Bytes that hold bits of several runs or positions are put together by atomics, from zeros.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ void store_gate(const Slice<T, kChannelsLast>& slice, int step,
                                           bool ragged, uint32_t valid, uint32_t bits,
                                           uint8_t* gate) {
  bits = slice.collect(bits & valid);
  valid = slice.collect(valid);
  const int64_t first = slice.own_group(step);
  if (!ragged) {
    if (valid) gate[first / kGroup] = static_cast<uint8_t>(bits);
  } else if (bits) {
    auto* const words = reinterpret_cast<uint32_t*>(gate) + first / 32;
    const uint64_t shifted = static_cast<uint64_t>(bits) << first % 32;
    const auto low = static_cast<uint32_t>(shifted), high = static_cast<uint32_t>(shifted >> 32);
    if (low) atomicOr(&words[0], low);
    if (high) atomicOr(&words[1], high);
  }
}

// The bits of one vector.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ uint32_t load_gate(int64_t element, uint32_t valid, bool ragged,
                                              int64_t numel, const uint8_t* gate) {
  if (valid == 0) return 0;
  uint32_t bits = gate[element / kGroup];
  if (kChannelsLast && ragged) {  // the vector may lie in two bytes
    const int64_t end = element + kVector<T> < numel ? element + kVector<T> : numel;
    bits |= uint32_t{gate[(end - 1) / kGroup]} << kGroup;
  }
  return bits >> element % kGroup;
}

// The channel of an item that this thread finishes, for threads of as many as an item has; else -1.
template <typename T>
__device__ __forceinline__ int64_t finished_channel(const ChannelPlan& plan, int64_t item) {
  const int channels = plan.channels<T>();
  const int64_t c = item * channels + threadIdx.x;
  return static_cast<int>(threadIdx.x) < channels && c < plan.layout.channels ? c : -1;
}

}  // namespace cuda
RK_NAMESPACE_END
