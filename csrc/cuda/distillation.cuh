// Knowledge distillation and its gradient, on raw pointers, for CUDA and for its emulation on the
// CPU.
//
// Bytes an element, s of the student's logits and t of the teacher's:
//   loss                   s + t
//   loss and gradient      2 s + t; what of both rows does not fit a block's shared memory is read
//                          twice: 3 s + 2 t
//   gradient from `stats`  2 s + t
// What limits: memory in float32. An element takes up to three exponentials for the loss and three
// for the gradient, which brings 16-bit types near the issue limit; not measured on a GPU yet.
//
// Layout: where the classes of a position lie side by side, a block a row, or a warp where there
// are few of them. A thread sums up what it comes across, relative to the largest values so far;
// then the threads agree on the largest, and add up. What a thread has read it keeps in shared
// memory, for itself alone. Where classes lie apart, or are but a handful, a thread a position.
// Losses are added up in double: a thread's, a block's, then by the last block to finish those of
// all blocks, in an order that the sizes determine.
#pragma once

#include <algorithm>

#include "distillation/walk.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kDistillationFewClasses = 16;     // up to these, a thread a position
constexpr int kDistillationWarpClasses = 1024;  // up to these, a warp a row
constexpr int64_t kMostDistillationBlocks = int64_t{1} << 16;

template <typename S, typename T>
LossPlan plan_distillation(const DistillationArguments<S, T>& a, int64_t shared_bytes,
                           int64_t most_blocks) {
  using Loss = DistillationLoss<S, T>;
  using Way = LossPlan::Way;
  LossPlan plan = LossPlan::of_small_blocks(Way::planes, a.positions, 1, kPlaneThreads);
  if (a.in_rows() && a.classes > kDistillationWarpClasses) {
    constexpr int kVectors = 2;  // of a thread
    const int64_t threads = ceil_div(ceil_div(a.classes, kVectors * a.kCount), kWarp) * kWarp;
    const auto block = static_cast<int>(std::clamp<int64_t>(threads, 4 * kWarp, Loss::kRowThreads));
    plan = {Way::long_rows, block, block};
    if (a.gradient) {
      constexpr int kUnit = Loss::KeptRow::kRoomUnit;
      const int64_t there = (shared_bytes - static_cast<int64_t>(sizeof(RowShared<Loss>))) /
                            Loss::KeptRow::bytes(kUnit);
      plan.kept = std::clamp<int64_t>(there, 0, ceil_div(a.classes, kUnit)) * kUnit;
    }
  } else if (a.in_rows() && a.classes > kDistillationFewClasses) {
    plan =
        LossPlan::of_small_blocks(Way::short_rows, a.positions, kWarp, Loss::kRowsABlock * kWarp);
  }
  plan.set_blocks(a.positions, most_blocks);
  return plan;
}

// The losses, (N, ...) or summed up, the stats and, where there is a place for it, the gradient.
// There is a position. allocate(bytes) returns device memory to be used on the stream.
template <typename S, typename T, typename Allocate>
void launch_distillation(DistillationArguments<S, T> a, Allocate&& allocate, cudaStream_t stream,
                         int64_t most_blocks = kMostDistillationBlocks) {
  a.known = DistillationFactors<compute_t<S>>(a.temperature, a.alpha, a.mean_of());
  const LossPlan plan = plan_distillation(a, most_shared_bytes(), most_blocks);
  prepare_loss(a, plan.blocks, allocate, stream);
  launch_walk<DistillationLoss<S, T>>(a, plan, stream);
  check_launch("distillation");
}

// The gradient, of the stats and grad_output.
template <typename S, typename T, typename Allocate>
void launch_distillation_backward(DistillationArguments<S, T> a, Allocate&& allocate,
                                  cudaStream_t stream, int64_t most_blocks = kMostBlocks) {
  a.known = DistillationFactors<compute_t<S>>(a.temperature, a.alpha, a.mean_of());
  prepare_loss(a, 0, allocate, stream);
  launch_gradient<DistillationGradient<S, T>>(a, stream, most_blocks, "distillation_backward");
}

}  // namespace cuda
RK_NAMESPACE_END
