// Cross-entropy and its gradient, on raw pointers, for CUDA and for its emulation on the CPU.
//
// Bytes a logit: a loss reads x, sizeof(T); with its gradient it writes as much in the same pass.
// The backward from statistics reads x and writes the gradient. Probabilities are read once more
// for the gradient, mostly from L2; so is what of a position is too long for a block's memory. Of a
// position 8 bytes of statistics, its labels, and a share of 8 bytes a block.
//
// Layout: where the classes of a position lie side by side, a warp or a part of one takes a row and
// keeps it in registers, or a block does in shared memory; where they lie apart, a thread takes a
// position. Each block's losses are added up in an order that the sizes alone decide, then the last
// block adds up the blocks'.
//
// Before it, where a mean is taken, one launch reads the labels; nothing waits on the host.
//
// What limits: memory. In 16 bits an H100 has time for 17 instructions a logit that is read, or 34
// where one is written too.
#pragma once

#include <algorithm>

#include "cross_entropy/rescale.cuh"
#include "cross_entropy/short_rows.cuh"
#include "cross_entropy/walk.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Of a grid that adds up losses: beyond that, blocks take several positions. A constant, so that
// the order of the sum is the same on every GPU.
constexpr int64_t kMostLossBlocks = 4096;

// Calls f with true or false, for kernels of dense targets or of bare labels. Those of dense
// targets serve for labels in float64 as well: few use it, and each kernel takes its time to
// compile.
template <typename T, typename F>
void for_density(const CrossEntropy<T>& a, const F& f) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (!a.is_dense()) return f.template operator()<false>();
  }
  f.template operator()<true>();
}

template <typename T>
LossPlan plan_loss(const CrossEntropy<T>& a, int64_t shared_bytes, int64_t most_blocks) {
  using Loss = CrossEntropyLoss<true, T>;  // which needs most of what is shared
  const int64_t vectors = a.most_vectors();
  LossPlan plan = LossPlan::of_small_blocks(LossPlan::Way::planes, a.positions, 1, kPlaneThreads);
  if (!a.in_rows()) {
    if (a.gradient) {
      // A few blocks a multiprocessor read faster than one that reads once.
      const int64_t room = std::max<int64_t>(0, shared_bytes / kPlaneBlocks -
                                                    static_cast<int64_t>(sizeof(LossShared))) /
                           (plan.threads * static_cast<int64_t>(sizeof(T)));
      plan.kept = room >= a.classes ? a.classes : room / kPlaneLoads * kPlaneLoads;
    }
  } else if (vectors <= kWarp * kShortVectors<T>) {
    plan = LossPlan::of_small_blocks(LossPlan::Way::short_rows, a.positions,
                                     power_of_two_from(vectors, kWarp), kShortThreads);
  } else {
    int threads = 4 * kWarp;
    while (threads < Loss::kRowThreads && threads * kLongLoads < vectors) threads *= 2;
    plan = {LossPlan::Way::long_rows, threads, threads};
    if (a.gradient) {
      const int64_t there = shared_bytes - static_cast<int64_t>(sizeof(RowShared<Loss>));
      plan.kept = std::min(vectors, there / kVectorBytes);
    }
  }
  plan.set_blocks(a.positions, most_blocks);
  return plan;
}

// The loss, its statistics and its gradient, whatever of them has a place. allocate(bytes) returns
// device memory to be used on the stream.
template <typename T, typename Allocate>
void launch_cross_entropy(CrossEntropy<T> a, Allocate&& allocate, cudaStream_t stream,
                          int64_t most_blocks = kMostLossBlocks) {
  const LossPlan plan = plan_loss(a, most_shared_bytes(), most_blocks);
  prepare_loss(a, plan.blocks, allocate, stream);
  for_density(a, [&]<bool kDense>() {
    if (plan.way != LossPlan::Way::short_rows) {
      return launch_walk<CrossEntropyLoss<kDense, T>>(a, plan, stream);
    }
    RK_LAUNCH((short_rows_kernel<kDense, T>), dim3(static_cast<unsigned>(plan.blocks)),
              dim3(plan.threads), sizeof(LossShared), stream, a, plan.lanes,
              static_cast<int>(a.most_vectors()));
  });
  check_launch("cross_entropy");
}

// The gradient, by grad_output. Of labels from the statistics. Of probabilities the softmax is made
// anew: what all classes of a position count for has to be summed up first.
template <typename T, typename Allocate>
void launch_cross_entropy_backward(CrossEntropy<T> a, Allocate&& allocate, cudaStream_t stream,
                                   int64_t most_blocks = kMostBlocks) {
  if (a.has_probabilities()) {
    a.stats = nullptr;
    launch_cross_entropy(a, allocate, stream, std::min(most_blocks, kMostLossBlocks));
    return;
  }
  prepare_loss(a, 0, allocate, stream);
  for_density(a, [&]<bool kDense>() {
    launch_gradient<CrossEntropyGradient<kDense, T>>(a, stream, most_blocks,
                                                     "cross_entropy_backward");
  });
}

}  // namespace cuda
RK_NAMESPACE_END
