// How the blocks of a launch share out the channels of a dense tensor (N, C, L), how a thread walks
// its part of one, 16 bytes at a time, and how a block keeps on the chip what it has read.
//
// An item is what is reduced together. It has rows, each `vectors` vectors of 16 bytes side by
// side:
//   channels first: an item is a channel, a row a group of eight elements of a run, the L values of
//     a sample. Groups begin at multiples of eight in the tensor, so that loads are aligned
//     whatever L is; a run's first and last group may be shared with the neighbouring channels.
//   channels last: an item is a strip of channels, up to 128 bytes of them, a row their values at
//     one position.
// `blocks` blocks share an item, each takes a slice of its rows. In a step, each thread takes eight
// elements: one part of kParts groups, which it shares with the kParts - 1 lanes beside it. A
// group's random draw, or its byte of a gate, is the business of one lane, which the others get by
// shuffle.
#pragma once

#include <algorithm>
#include <cstdint>

#include "async_copy.cuh"
#include "channel_layout.h"
#include "launch.cuh"
#include "philox.h"
#include "vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

template <typename T>
constexpr int kParts = kGroup / kVector<T>;  // vectors a group, vectors of a thread a step: 1, 2, 4

template <typename T>
constexpr uint32_t kWholeVector = (1u << kVector<T>)-1;  // a bit for each of its elements

// Reductions take so many vectors of a thread at once.
constexpr int kBatch = 4;
template <typename T>
constexpr int kBatchSteps = kBatch / kParts<T>;

// Steps that copies are ahead of their use by: eight vectors of one tensor, or four of several.
// With 512 threads a multiprocessor, that is 64 KB on their way; Hopper's memory wants some 25.
template <typename T>
constexpr int kFarAhead = 8 / kParts<T>;
template <typename T>
constexpr int kAhead = 4 / kParts<T>;

// Resident threads of a multiprocessor: with 128 registers each, they fill its register file. They
// are one block or a power of two of them.
constexpr int kResidentThreads = 512;
constexpr int kLeastThreads = 64;  // a block: as many as a strip has channels
constexpr int kMapThreads = 128;   // a block of the kernels that only map

// Division by a number that is known at launch, for dividends below 2^31.
//
// T. Granlund, P. Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
struct Divider {
  uint32_t divisor, magic, shift;

  static Divider by(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - divisor;
    return {divisor, static_cast<uint32_t>((rest << 32) / divisor + 1), shift};
  }

  __device__ uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32) + n) >> shift;
  }
};

// ---- The plan of a launch.

// What a plan has to know of the current device.
struct Chip {
  int multiprocessors;
  int threads;                // resident ones a multiprocessor
  int64_t shared_bytes;       // a multiprocessor
  int64_t most_shared_bytes;  // a block
  int64_t reserved_bytes;     // a block, for CUDA itself

  static Chip current() {
    int device = 0;
    cudaGetDevice(&device);
    const auto get = [&](cudaDeviceAttr attribute) {
      int value = 0;
      cudaDeviceGetAttribute(&value, attribute, device);
      return value;
    };
    const Chip chip{
        get(cudaDevAttrMultiProcessorCount),
        std::min(kResidentThreads, get(cudaDevAttrMaxThreadsPerMultiProcessor)),
        get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        get(cudaDevAttrReservedSharedMemoryPerBlock),
    };
    check_launch("cudaDeviceGetAttribute");
    return chip;
  }

  int64_t blocks(int block_threads) const {
    return int64_t{multiprocessors} * (threads / block_threads);
  }

  // For each of the blocks of so many threads that fill a multiprocessor.
  int64_t block_bytes(int block_threads) const {
    return std::min(shared_bytes / (threads / block_threads) - reserved_bytes, most_shared_bytes);
  }
};

// How a launch shares out a tensor: made by plan_map or plan_reduction.
struct ChannelPlan {
  ChannelLayout layout;  // with the channels last where L is 1
  int64_t numel;
  int64_t count;       // M = N L, values a channel
  bool ragged;         // groups do not end where runs or positions do
  bool direct;         // whole vectors can be moved wherever one of their elements is wanted
  Divider run_groups;  // channels first: groups a run

  int64_t items, rows;
  int vectors;     // a row
  int threads;     // a block
  int64_t groups;  // of blocks: each group takes item after item
  int blocks;      // a group
  int64_t slice;   // rows a block
  int kept;        // steps that stay in shared memory, of each tensor
  int ring;        // room for the others' passing through it
  int64_t shared_bytes;

  template <typename T>
  RK_HD int channels() const {  // an item
    return layout.channels_last ? vectors * kVector<T> : 1;
  }

  template <typename T>
  void set_vectors(int count) {
    vectors = count;
    items = ceil_div(layout.channels, channels<T>());
  }

  // Steps that `block_threads` threads take for so many rows.
  template <typename T>
  int64_t steps(int block_threads, int64_t some_rows) const {
    return ceil_div(some_rows, int64_t{block_threads} / vectors * kParts<T>);
  }

  dim3 grid() const { return dim3(static_cast<unsigned>(groups * blocks)); }
  dim3 block() const { return dim3(static_cast<unsigned>(threads)); }
};

// The plan's part that depends on the tensors alone. `aligned`: they all begin at a multiple of 16
// bytes.
template <typename T>
ChannelPlan describe(ChannelLayout layout, int64_t numel, bool aligned) {
  layout.channels_last = layout.channels_last || layout.length == 1;
  const int64_t inner = layout.channels_last ? layout.channels : layout.length;
  // A run that begins anywhere in a group reaches into so many.
  const int64_t run_groups =
      inner % kGroup == 0 ? inner / kGroup : (inner + 2 * kGroup - 2) / kGroup;
  ChannelPlan plan{};
  plan.layout = layout;
  plan.numel = numel;
  plan.count = numel / layout.channels;
  plan.ragged = inner % kGroup != 0;
  plan.direct = aligned && (layout.channels_last ? inner : numel) % kVector<T> == 0;
  plan.run_groups = Divider::by(static_cast<uint32_t>(run_groups));
  int vectors = kParts<T>;
  if (layout.channels_last) {
    plan.rows = plan.count;
    while (vectors < 128 / kVectorBytes && vectors * kVector<T> < layout.channels) vectors *= 2;
  } else {
    plan.rows = plan.count / layout.length * run_groups;
  }
  plan.set_vectors<T>(vectors);
  return plan;
}

// Of kernels that read `tensors` tensors once. Every thread gets eight vectors of one, or four of
// each of several: enough for the channels' constants to be made rarely, few enough to be asked for
// at once.
template <typename T>
ChannelPlan plan_map(const ChannelLayout& layout, int64_t numel, bool aligned, int tensors,
                     int64_t scratch_bytes) {
  const int steps = tensors == 1 ? kFarAhead<T> : kAhead<T>;
  ChannelPlan plan = describe<T>(layout, numel, aligned);
  plan.threads = kMapThreads;
  plan.slice = int64_t{steps} * kParts<T> * plan.threads / plan.vectors;
  plan.blocks = static_cast<int>(ceil_div(plan.rows, plan.slice));
  plan.groups = plan.items;
  plan.kept = static_cast<int>(plan.steps<T>(plan.threads, std::min(plan.slice, plan.rows)));
  plan.shared_bytes =
      scratch_bytes + int64_t{kVectorBytes} * kParts<T> * tensors * plan.threads * plan.kept;
  return plan;
}

// What a reduction needs of shared memory: `tensors` tensors are to be kept, or else to pass
// through rings of `ring` steps; besides, so many bytes a thread and a block.
struct SharedNeeds {
  int tensors, ring;
  int64_t thread_bytes, block_bytes;
};

// Of kernels that reduce an item and then need it once more.
//
// An item that fits into one block's shared memory gets one: nobody waits for anybody. A larger one
// gets the fewest blocks that keep all of it, in groups of which several work on items of their
// own: while one waits, or only writes, another reads. What no grid can keep is spread over all
// blocks, and the rest of it is read a second time.
template <typename T>
ChannelPlan plan_reduction(const ChannelLayout& layout, int64_t numel, bool aligned,
                           const SharedNeeds& needs, Chip chip) {
  ChannelPlan plan = describe<T>(layout, numel, aligned);
  const int64_t step_bytes = int64_t{kVectorBytes} * kParts<T> * needs.tensors;  // a thread
  const auto most_steps = [&](int threads) {
    return (chip.block_bytes(threads) - needs.block_bytes - threads * needs.thread_bytes) /
           (threads * step_bytes);
  };
  while (most_steps(chip.threads) < needs.ring) chip.threads /= 2;  // a smaller GPU
  // A batch's rest is filled with zeros, so whole batches of steps are kept.
  const auto most_kept = [&](int threads) {
    return most_steps(threads) / kBatchSteps<T> * kBatchSteps<T>;
  };
  constexpr int64_t kNever = int64_t{1} << 60;
  const auto blocks_to_keep = [&](int threads) {
    const int64_t kept = most_kept(threads);
    return kept > 0 ? ceil_div(plan.steps<T>(threads, plan.rows), kept) : kNever;
  };
  const int whole = chip.threads, half = whole / 2;

  if (plan.layout.channels_last) {
    // Narrower strips where there are too few for the chip or where one does not fit it: two
    // sectors of 32 bytes, or one where each strip fits one block.
    const int widest = plan.vectors;
    const auto fits = [&] { return blocks_to_keep(whole) <= chip.blocks(whole); };
    while (plan.vectors > std::max(kParts<T>, 4) &&
           (plan.items < chip.multiprocessors || !fits())) {
      plan.set_vectors<T>(plan.vectors / 2);
    }
    if (!fits()) plan.set_vectors<T>(widest);
    while (plan.vectors > std::max(kParts<T>, 2) && plan.items < chip.multiprocessors &&
           blocks_to_keep(whole) == 1) {
      plan.set_vectors<T>(plan.vectors / 2);
    }
  }

  if (blocks_to_keep(whole) == 1) {
    plan.blocks = 1;
    plan.groups = plan.items;
    plan.threads = whole;
    const auto too_many = [&] {  // for the item, or for as many items at once as there could be
      return blocks_to_keep(plan.threads / 2) == 1 &&
             (plan.rows * plan.vectors <= plan.threads / 2 ||
              plan.items > chip.blocks(plan.threads));
    };
    while (plan.threads > kLeastThreads && too_many()) plan.threads /= 2;
  } else {
    constexpr int64_t kLeastBytes = 16384;  // of each tensor that a block should get
    plan.threads = 2 * blocks_to_keep(half) <= chip.blocks(half) ? half : whole;
    const int64_t most = chip.blocks(plan.threads);
    const int64_t needed = std::min(blocks_to_keep(plan.threads), most);
    const int64_t rounds = ceil_div(plan.items, std::min(plan.items, most / needed));
    plan.groups = ceil_div(plan.items, rounds);
    const int64_t useful = plan.rows * plan.vectors * kVectorBytes / kLeastBytes;
    plan.blocks = static_cast<int>(std::min(most / plan.groups, std::max(needed, useful)));
  }
  plan.slice = ceil_div(plan.rows, plan.blocks);
  const int64_t steps =
      ceil_div(plan.steps<T>(plan.threads, plan.slice), kBatchSteps<T>) * kBatchSteps<T>;
  plan.ring = steps > most_kept(plan.threads) ? needs.ring : 0;
  plan.kept = static_cast<int>(plan.ring ? most_steps(plan.threads) - plan.ring : steps);
  plan.shared_bytes = needs.block_bytes + plan.threads * needs.thread_bytes +
                      plan.threads * step_bytes * (plan.kept + plan.ring);
  return plan;
}

// ---- A thread's walk.

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
