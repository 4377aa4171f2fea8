// How a thread walks its part of a slice (channel_plan.cuh), 16 bytes at a time, and how a block
// keeps on the chip what it has read.
//
// In a step, each thread takes eight elements: one part of kParts groups, which it shares with the
// kParts - 1 lanes beside it. A group's random draw, or its byte of a gate, is the business of one
// lane, which the others get by shuffle.
#pragma once

#include "async_copy.cuh"
#include "channel_plan.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// A thread's part of its block's slice of an item.
template <typename T, bool kChannelsLast>
class Slice {
 public:
  __device__ Slice(const ChannelPlan& plan, int64_t item, int rank) : plan_(plan) {
    const int thread = threadIdx.x, vector = thread % plan.vectors;
    const int64_t begin = rank * plan.slice, left = plan.rows - begin;
    rows_ = static_cast<uint32_t>(left < 0 ? 0 : left < plan.slice ? left : plan.slice);
    step_rows_ = blockDim.x / plan.vectors * kParts<T>;
    lane_row_ = thread / plan.vectors * kParts<T>;
    part_ = thread % kParts<T>;
    if constexpr (kChannelsLast) {
      const int64_t column = (item * plan.vectors + vector) * kVector<T>;
      columns_ = bits_below(plan.layout.channels - column);
      stride_ = plan.layout.channels;
      origin_ = begin * stride_ + column;
    } else {
      const int64_t run = begin / plan.run_groups.divisor;
      first_group_ = static_cast<uint32_t>(begin % plan.run_groups.divisor);
      stride_ = plan.layout.channels * plan.layout.length;
      origin_ = run * stride_ + item * plan.layout.length;
    }
  }

  __device__ int steps() const { return static_cast<int>(ceil_div(rows_, step_rows_)); }

  // The element that vector k of a step begins with; returns which of its elements are the
  // thread's.
  __device__ __forceinline__ uint32_t locate(int step, int k, int64_t& element) const {
    const uint32_t row = step * step_rows_ + lane_row_ + k;
    uint32_t valid;
    if constexpr (kChannelsLast) {
      element = origin_ + row * stride_;
      valid = columns_;
    } else {
      const uint32_t counted = first_group_ + row, run = plan_.run_groups.divide(counted);
      const uint32_t group = counted - run * plan_.run_groups.divisor;  // of the run
      int64_t start = origin_ + run * stride_;
      valid = kWholeVector<T>;
      if (plan_.ragged) {
        // The run's first group begins before it by so many elements.
        const auto before = static_cast<uint32_t>(start) % kGroup;
        const int64_t rest = plan_.layout.length + before - int64_t{group} * kGroup;
        uint32_t own = rest >= kGroup ? 0xffu : rest <= 0 ? 0u : (1u << rest) - 1;
        if (group == 0) own &= 0xffu << before;
        valid = own >> part_ * kVector<T> & kWholeVector<T>;
        start -= before;
      }
      element = start + int64_t{group} * kGroup + part_ * kVector<T>;
    }
    return row < rows_ ? valid : 0u;
  }

  // Calls use(k, element, valid) for each vector of a step.
  template <typename Use>
  __device__ __forceinline__ void for_vectors(int step, const Use& use) const {
    const auto turn = [&](int k) {
      int64_t element;
      const uint32_t valid = locate(step, k, element);
      use(k, element, valid);
    };
    if constexpr (kParts<T> == 4) {  // double, whose functions are long: once is enough
      RK_NO_UNROLL
      for (int k = 0; k < kParts<T>; ++k) turn(k);
    } else {
      RK_UNROLL
      for (int k = 0; k < kParts<T>; ++k) turn(k);
    }
  }

  // The first element of the group of a step that is this lane's business.
  __device__ __forceinline__ int64_t own_group(int step) const {
    int64_t element;
    locate(step, part_, element);
    return element - part_ * kVector<T>;
  }

  // Whether all threads' groups of the steps before this one are wholly theirs. With the channels
  // last, those past the last channel count as well.
  __device__ bool whole_before(int step) const {
    return step * step_rows_ <= rows_ && (kChannelsLast || !plan_.ragged);
  }

  // The element of one of three values of the thread's first channel: the item's first, its last
  // and one from the middle.
  __device__ int64_t sample(int64_t item, int which) const {
    const int64_t samples = plan_.count / plan_.layout.length;
    const int64_t n = which == 0 ? 0 : which == 1 ? samples / 2 : samples - 1;
    const int64_t l = which == 0   ? 0
                      : which == 1 ? plan_.layout.length / 2
                                   : plan_.layout.length - 1;
    if constexpr (kChannelsLast) {
      const int64_t column = (item * plan_.vectors + threadIdx.x % plan_.vectors) * kVector<T>;
      return (n * plan_.layout.length + l) * stride_ + column;
    } else {
      return n * stride_ + item * plan_.layout.length + l;
    }
  }

  // Whether the thread's channel k exists.
  __device__ bool has_column(int k) const { return !kChannelsLast || (columns_ >> k & 1u); }

  // Eight bits for a group, known to the lane whose business it is, to the bits of this lane's
  // vectors. All lanes of a warp take part in this and in `collect`.
  __device__ uint32_t distribute(uint32_t own) const {
    if constexpr (kParts<T> == 1) return own;
    const int first = static_cast<int>(threadIdx.x) % kWarp - part_;
    uint32_t bits = 0;
    RK_UNROLL
    for (int k = 0; k < kParts<T>; ++k) {
      const uint32_t group = __shfl_sync(kFullWarp, own, first + k);
      bits |= (group >> part_ * kVector<T> & kWholeVector<T>) << 8 * k;
    }
    return bits;
  }

  // The other way round.
  __device__ uint32_t collect(uint32_t bits) const {
    if constexpr (kParts<T> == 1) return bits;
    bits <<= part_ * kVector<T>;
    RK_UNROLL
    for (int distance = 1; distance < kParts<T>; distance *= 2) {
      bits |= __shfl_xor_sync(kFullWarp, bits, distance);
    }
    return bits >> 8 * part_ & 0xffu;
  }

 private:
  static __device__ uint32_t bits_below(int64_t n) {
    return n <= 0 ? 0u : n >= kVector<T> ? kWholeVector<T> : (1u << n) - 1;
  }

  const ChannelPlan& plan_;
  uint32_t rows_;       // of the slice
  uint32_t step_rows_;  // that the block takes in a step
  uint32_t lane_row_;   // the thread's first one of a step
  int part_;            // of its groups that the thread has
  // Channels last: the element of row 0, from there to row 1's, and which elements are channels.
  // Channels first: the first element of row 0's run, from there to the next run, and row 0's place
  // among its groups.
  int64_t origin_, stride_;
  uint32_t columns_, first_group_;
};

// ---- Shared memory for what is read: each thread's vectors are its own, nobody waits for anybody.

// Steps of one tensor: the first `kept` of them stay, the others pass through a ring.
template <typename T, int kRing>
class Staging {
 public:
  // `before`: steps of other tensors that lie in front.
  __device__ Staging(void* shared, int kept, int before)
      : first_(static_cast<VectorBits*>(shared) + slot(before, 0) + threadIdx.x), kept_(kept) {}

  __device__ bool keeps(int step) const { return step < kept_; }

  // Asks for vector k of a step, which Slice::locate has found at data + element.
  __device__ __forceinline__ void read(const T* data, bool direct, int64_t element, uint32_t valid,
                                       int step, int k) const {
    if (direct) {
      copy_async(at(step, k), data + element, valid != 0);
      return;
    }
    Vector<T> vector{};
    RK_UNROLL
    for (int j = 0; j < kVector<T>; ++j) {
      if (valid >> j & 1u) vector.v[j] = data[element + j];
    }
    *at(step, k) = bit_cast<VectorBits>(vector);
  }

  __device__ Vector<T> get(int step, int k) const {
    const VectorBits bits = *at(step, k);
    return bit_cast<Vector<T>>(bits);
  }

 private:
  static __device__ int slot(int step, int k) {
    return (step * kParts<T> + k) * static_cast<int>(blockDim.x);
  }
  __device__ VectorBits* at(int step, int k) const {
    return first_ + slot(step < kept_ ? step : kept_ + (step - kept_) % kRing, k);
  }

  VectorBits* first_;
  int kept_;
};

// A walk over steps [0, steps) in one direction calls read(step) kStepsAhead steps before
// use(step), which gets kUse steps at once; a ring has room for both together. It begins with
// read_ahead; there is time for something else before it goes on.
template <int kStepsAhead, bool kBackwards, typename Read>
__device__ __forceinline__ void read_ahead(int steps, const Read& read) {
  RK_NO_UNROLL
  for (int i = 0; i < kStepsAhead; ++i) {
    if (i < steps) read(kBackwards ? steps - 1 - i : i);
    commit_copies();
  }
}

template <int kStepsAhead, bool kBackwards, int kUse, typename Read, typename Use>
__device__ __forceinline__ void walk(int steps, const Read& read, const Use& use) {
  RK_NO_UNROLL
  for (int i = 0; i < steps; i += kUse) {
    RK_UNROLL
    for (int k = 0; k < kUse; ++k) {
      const int next = i + k + kStepsAhead;
      if (next < steps) read(kBackwards ? steps - 1 - next : next);
      commit_copies();
    }
    wait_for_copies<kStepsAhead>();
    use(kBackwards ? steps - 1 - i : i);
  }
}

// Writes the valid elements of a vector.
template <typename T>
__device__ __forceinline__ void store_valid(T* data, bool direct, uint32_t valid, int64_t element,
                                            const Vector<T>& value) {
  if (direct && valid == kWholeVector<T>) {
    store_vector<true>(Span<T>{data, 0, 0}, element, value);
    return;
  }
  RK_UNROLL
  for (int j = 0; j < kVector<T>; ++j) {
    if (valid >> j & 1u) data[element + j] = value.v[j];
  }
}

}  // namespace cuda
RK_NAMESPACE_END
