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

#include "distillation/planes.cuh"
#include "distillation/rows.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kDistillationFewClasses = 16;      // up to these, a thread a position
constexpr int kDistillationWarpClasses = 1024;   // up to these, a warp a row
constexpr int64_t kFewDistillationBlocks = 512;  // up to so many, blocks become smaller
constexpr int64_t kMostDistillationBlocks = int64_t{1} << 16;

// How positions are shared out.
struct DistillationPlan {
  bool by_rows;
  int threads;  // of a position
  int block;    // of a block
  int64_t blocks;
  int room;  // elements kept of a row
};

template <typename S, typename T>
DistillationPlan plan_distillation(const DistillationArguments<S, T>& a, bool classes_last,
                                   int64_t shared_bytes, int64_t most_blocks) {
  using C = compute_t<S>;
  using Kept = KeptRow<S, T>;
  DistillationPlan plan{};
  plan.by_rows = classes_last && a.classes > kDistillationFewClasses;
  if (plan.by_rows && a.classes > kDistillationWarpClasses) {
    constexpr int kVectors = 2;  // of a thread
    const int64_t threads = ceil_div(a.classes, kVectors * DistillationRow<S, T>::kCount);
    plan.block = static_cast<int>(
        std::clamp<int64_t>(ceil_div(threads, kWarp) * kWarp, 4 * kWarp, kDistillationThreads<C>));
    plan.threads = plan.block;
    if (a.forward && a.gradient) {
      const int64_t wanted = ceil_div(a.classes, Kept::kRoomUnit);
      const int64_t there = (shared_bytes - static_cast<int64_t>(sizeof(DistillationShared<C>))) /
                            Kept::bytes(Kept::kRoomUnit);
      plan.room = static_cast<int>(std::clamp<int64_t>(there, 0, wanted)) * Kept::kRoomUnit;
    }
  } else {
    plan.threads = plan.by_rows ? kWarp : 1;
    plan.block = plan.by_rows ? kWarpRows * kWarp : kDistillationPlaneThreads;
    while (plan.block > kWarp &&
           ceil_div(a.positions, plan.block / plan.threads) < kFewDistillationBlocks) {
      plan.block /= 2;
    }
  }
  plan.blocks = std::min(ceil_div(a.positions, plan.block / plan.threads), most_blocks);
  return plan;
}

struct DistillationOptions {
  bool classes_last;  // of a position side by side, else layout.length apart
  Reduction reduction;
  double temperature, alpha;
  const double* traced;  // null, or the two on the device, which then count instead
};

// `a` has all but what follows from the options. `allocate(bytes)` returns device memory that lives
// as long as the stream needs it. There is a position.
template <typename S, typename T, typename Allocate>
void launch_distillation_pass(DistillationArguments<S, T> a, const DistillationOptions& options,
                              Allocate&& allocate, cudaStream_t stream, const char* op,
                              int64_t most_blocks) {
  using C = compute_t<S>;
  const bool is_mean = options.reduction == Reduction::mean;
  a.mean_of = is_mean ? a.positions : 1;
  a.known = DistillationFactors<C>(options.temperature, options.alpha, a.mean_of);
  a.traced = options.traced;
  a.classes = a.labels.classes;
  a.length = options.classes_last ? 1 : a.labels.positions;
  const DistillationPlan plan =
      plan_distillation(a, options.classes_last, most_shared_bytes(), most_blocks);
  a.threads = plan.threads;
  a.room = plan.room;
  if (a.sum.loss || is_mean || (a.weight && a.labels.smooths())) {
    const int64_t partials = a.sum.loss ? plan.blocks : 0;
    const LossScratch scratch(allocate(LossScratch::bytes(a.positions, a.classes, partials)),
                              partials);
    a.target_sums = launch_target_sums(a.labels, a.weight, a.positions, is_mean, scratch, stream);
    a.sum.partials = scratch.partials;
    a.sum.ticket = scratch.tickets;
  }
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(static_cast<unsigned>(plan.block));
  if (!plan.by_rows) {
    RK_LAUNCH((distillation_planes_kernel<S, T>), grid, block, sizeof(LossShared), stream, a);
  } else {
    const auto kernel = distillation_rows_kernel<S, T>;
    const int64_t bytes =
        static_cast<int64_t>(sizeof(DistillationShared<C>)) + KeptRow<S, T>::bytes(plan.room);
    allow_shared_bytes(kernel, bytes);
    RK_LAUNCH(kernel, grid, block, static_cast<size_t>(bytes), stream, a);
  }
  check_launch(op);
}

// The losses, (N, ...) or summed up, the stats and, where there is a place for it, the gradient.
template <typename S, typename T, typename Allocate>
void launch_distillation(DistillationArguments<S, T> a, const DistillationOptions& options,
                         Allocate&& allocate, cudaStream_t stream,
                         int64_t most_blocks = kMostDistillationBlocks) {
  a.forward = true;
  launch_distillation_pass(a, options, allocate, stream, "distillation", most_blocks);
}

// The gradient, of the stats and grad_output.
template <typename S, typename T, typename Allocate>
void launch_distillation_backward(DistillationArguments<S, T> a, const DistillationOptions& options,
                                  Allocate&& allocate, cudaStream_t stream,
                                  int64_t most_blocks = kMostDistillationBlocks) {
  a.forward = false;
  launch_distillation_pass(a, options, allocate, stream, "distillation_backward", most_blocks);
}

}  // namespace cuda
RK_NAMESPACE_END
