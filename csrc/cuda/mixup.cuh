// Mixup and CutMix, and their gradient, on raw pointers, for CUDA and for its emulation on the CPU.
//
// Bytes an element, each counted once: sizeof(In) read and sizeof(Out) written, forward, backward
// and in place (4 B in bf16, 3 B from bytes to bf16). Each sample is read by itself and by whoever
// has it for a partner. Blocks are in the order of tiles, all samples of one place side by side, so
// that the second reading finds it in L2: a tile of 256 samples takes 2 MB there at most. Of what
// a box or a weight of 0 leaves out nothing is read. In place a sample is read once.
//
// What limits: memory. Nothing waits on the host for the values of lam, index and boxes: they are
// asserted here.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "mixup/cycles.cuh"
#include "mixup/flat.cuh"
#include "mixup/transpose.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid; from there on, blocks take several tasks

// Whether vectors of kMixupVector elements can be moved, where rows of `row` elements begin at
// `data`.
template <int kCount, typename T>
bool moves_whole(const T* data, int64_t row) {
  return row % kCount == 0 &&
         reinterpret_cast<uintptr_t>(data) % kAlignment<kCount * sizeof(T)> == 0;
}

template <typename In, typename Out>
MixupArguments<In, Out> mixup_arguments(const In* x, Out* y, const MixupBlend& blend,
                                        const ChannelLayout& layout, bool to_channels_last,
                                        const void* scale, const void* shift) {
  using C = mixup_compute_t<In, Out>;
  if (blend.boxes && (blend.height > kMostColumns || blend.width > kMostColumns)) {
    throw std::invalid_argument("mixup: boxes need images of at most 2^30 rows and columns");
  }
  MixupArguments<In, Out> a{};
  a.x = x;
  a.y = y;
  a.blend = blend;
  a.reversed = blend.index == nullptr;
  a.layout = layout;
  // With one channel, or one position, both layouts are the same.
  const bool either = layout.channels == 1 || layout.length == 1;
  a.to_channels_last = either ? layout.channels_last : to_channels_last;
  a.scale = static_cast<const C*>(scale);
  a.shift = static_cast<const C*>(shift);
  return a;
}

template <int kCount>
MixupTasks mixup_tasks(const ChannelLayout& layout, bool whole, int64_t samples) {
  const int64_t numel = layout.channels * layout.length;
  const int64_t vectors = whole ? numel / kCount : numel;
  const int64_t loads = whole ? kMixupLoads<kCount> : kMixupLoads<1>;
  MixupTasks tasks{};
  tasks.whole = whole;
  tasks.lanes = static_cast<int>(std::min<int64_t>(ceil_div(vectors, loads), kMixupThreads));
  tasks.tasks_a_block = kMixupThreads / tasks.lanes;
  tasks.tasks_a_tile = samples;
  tasks.tasks = ceil_div(vectors, loads * tasks.lanes) * samples;
  return tasks;
}

inline dim3 mixup_grid(int64_t blocks, int64_t most_blocks) {
  return dim3(static_cast<unsigned>(std::min(blocks, most_blocks)));
}

template <MixupPass kPass, typename In, typename Out>
void launch_mixup_flat(MixupArguments<In, Out> a, cudaStream_t stream, const char* op,
                       int64_t most_blocks) {
  constexpr int kCount = kMixupVector<In, Out>;
  const int64_t numel = a.layout.channels * a.layout.length;
  const bool whole = moves_whole<kCount>(a.x, numel) && moves_whole<kCount>(a.y, numel);
  const MixupTasks tasks = mixup_tasks<kCount>(a.layout, whole, a.blend.samples);
  RK_LAUNCH((mixup_kernel<kPass, In, Out>),
            mixup_grid(ceil_div(tasks.tasks, tasks.tasks_a_block), most_blocks),
            dim3(kMixupThreads), 0, stream, a, tasks);
  check_launch(op);
}

template <MixupPass kPass, typename In, typename Out>
void launch_mixup_transpose(MixupArguments<In, Out> a, cudaStream_t stream, const char* op,
                            int64_t most_blocks) {
  constexpr int kCount = kMixupVector<In, Out>;
  const int64_t channels = a.layout.channels, length = a.layout.length;
  const bool few = channels <= kMixupFewChannels;
  const int64_t last_row = few ? channels * length : channels;
  const bool from_last = a.layout.channels_last;
  MixupTiles tiles{};
  tiles.whole_in = moves_whole<kCount>(a.x, from_last ? last_row : length);
  tiles.whole_out = moves_whole<kCount>(a.y, from_last ? length : last_row);
  tiles.positions =
      few ? static_cast<int>(kMixupTile / channels / kMixupSide * kMixupSide) : kMixupSide;
  tiles.strips = few ? 0 : ceil_div(channels, kMixupSide);
  tiles.tasks =
      std::max<int64_t>(tiles.strips, 1) * ceil_div(length, tiles.positions) * a.blend.samples;
  const int64_t elements = few ? channels * tiles.positions : kMixupSide * kMixupSide;
  RK_LAUNCH((mixup_transpose_kernel<kPass, In, Out>), mixup_grid(tiles.tasks, most_blocks),
            dim3(kMixupThreads), static_cast<size_t>(elements) * sizeof(Out), stream, a, tiles);
  check_launch(op);
}

template <MixupPass kPass, typename In, typename Out>
void launch_mixup_pass(const MixupArguments<In, Out>& a, cudaStream_t stream, const char* op,
                       int64_t most_blocks) {
  if (a.blend.samples == 0 || a.layout.channels == 0 || a.layout.length == 0) return;
  if constexpr (kMixupVector<In, Out> > 1) {
    if (a.layout.channels_last != a.to_channels_last) {
      launch_mixup_transpose<kPass>(a, stream, op, most_blocks);
      return;
    }
  }
  launch_mixup_flat<kPass>(a, stream, op, most_blocks);
}

// y = the blend of x, both (N, C, L), times scale plus shift; x lies as `layout` says. scale,
// shift: (C,), of the type that is computed in, or null.
template <typename In, typename Out>
void launch_mixup(const In* x, Out* y, const MixupBlend& blend, const ChannelLayout& layout,
                  bool to_channels_last, const void* scale, const void* shift, cudaStream_t stream,
                  int64_t most_blocks = kMostBlocks) {
  const auto a = mixup_arguments(x, y, blend, layout, to_channels_last, scale, shift);
  launch_mixup_pass<MixupPass::forward>(a, stream, "mixup", most_blocks);
}

// grad_input = scale times what grad_output gives to each sample: of itself, and of the samples
// receivers[starts[n]:starts[n + 1]] whose partner n is; those null: the batch reversed.
template <typename In, typename Out>
void launch_mixup_backward(const In* grad_output, Out* grad_input, const MixupBlend& blend,
                           const int64_t* receivers, const int64_t* starts,
                           const ChannelLayout& layout, bool to_channels_last, const void* scale,
                           cudaStream_t stream, int64_t most_blocks = kMostBlocks) {
  auto a =
      mixup_arguments(grad_output, grad_input, blend, layout, to_channels_last, scale, nullptr);
  a.receivers = receivers;
  a.reversed = receivers == nullptr;
  a.starts = starts;
  launch_mixup_pass<MixupPass::backward>(a, stream, "mixup_backward", most_blocks);
}

// The same as launch_mixup, over x itself; index is a permutation, or null.
template <typename T>
void launch_mixup_in_place(T* x, const MixupBlend& blend, const ChannelLayout& layout,
                           const void* scale, const void* shift, cudaStream_t stream,
                           int64_t most_blocks = kMostBlocks) {
  constexpr int kCount = kMixupVector<T, T>;
  const int64_t numel = layout.channels * layout.length;
  if (blend.samples == 0 || numel == 0) return;
  const MixupArguments<T, T> a =
      mixup_arguments<T, T>(x, x, blend, layout, layout.channels_last, scale, shift);
  const bool whole = moves_whole<kCount>(x, numel);
  if (a.reversed) {
    const MixupTasks tasks = mixup_tasks<kCount>(layout, whole, ceil_div(blend.samples, 2));
    RK_LAUNCH(mixup_pairs_kernel<T>,
              mixup_grid(ceil_div(tasks.tasks, tasks.tasks_a_block), most_blocks),
              dim3(kMixupThreads), 0, stream, a, tasks);
  } else {
    const int64_t vectors = whole ? numel / kCount : numel;
    const int64_t threads = std::min<int64_t>(ceil_div(vectors, kWarp) * kWarp, kMixupThreads);
    MixupWalks walks{};
    walks.whole = whole;
    walks.groups = ceil_div(blend.samples, kWarp);
    walks.tasks = ceil_div(vectors, threads) * walks.groups;
    RK_LAUNCH(mixup_walk_kernel<T>, mixup_grid(walks.tasks, most_blocks),
              dim3(static_cast<unsigned>(threads)),
              static_cast<size_t>(kCycleAhead * threads) * sizeof(VectorBits), stream, a, walks);
  }
  check_launch("mixup_");
}

}  // namespace cuda
RK_NAMESPACE_END
