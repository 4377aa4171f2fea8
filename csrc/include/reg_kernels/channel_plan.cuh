// How the blocks of a launch share out the channels of a dense tensor (N, C, L).
//
// An item is what is reduced together. It has rows, each `vectors` vectors of 16 bytes side by
// side:
//   channels first: an item is a channel, a row a group of eight elements of a run, the L values of
//     a sample. Groups begin at multiples of eight in the tensor, so that loads are aligned
//     whatever L is; a run's first and last group may be shared with the neighbouring channels.
//   channels last: an item is a strip of channels, up to 128 bytes of them, a row their values at
//     one position.
// `blocks` blocks share an item, each takes a slice of its rows.
#pragma once

#include <algorithm>
#include <cstdint>

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

}  // namespace cuda
RK_NAMESPACE_END
