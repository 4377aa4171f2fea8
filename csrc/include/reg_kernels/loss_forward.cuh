// The forward of the losses of logits; where the gradient has a place, the same launch writes it.
// This file holds how threads walk over positions and their classes, which is alike for every loss.
//
// A loss is a class `Loss`. Each thread makes one of it from the Arguments. It has:
//   begin       takes where a position starts, before any of its classes
//   target      reads what the labels of the position say
//   load        loads one class where classes lie apart; past the last, one that adds nothing
//   add_planes  adds a block of such classes to Sums; with kPadsPlanes it may reach past the last
//   add_row     adds kRowLoads vectors of a row to Sums; Row loads them
//   joined      merges the Sums of all threads of a row
//   gradient    gives a Gradient (loss_backward.cuh), which writes the gradients of classes with
//               write_planes and write_row
//   KeptRow     keeps a thread's part of a row in shared memory, at places no other thread uses
// The function finish_position makes the loss of a position from its target and its Sums.
#pragma once

#include <type_traits>

#include "loss.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// ---- Classes that lie apart, or only a handful: a thread takes a position.

// Calls f(count, c) until all classes of a position are done: f takes `count` classes from c on.
// The count is a constant of the compiler.
template <typename Loss, typename F>
__device__ __forceinline__ void for_planes(int64_t classes, const F& f) {
  constexpr int kLoads = Loss::Gradient::kClassLoads;
  int64_t c = 0;
  RK_NO_UNROLL
  for (; Loss::kPadsPlanes ? c < classes : c + kLoads <= classes; c += kLoads) {
    f(std::integral_constant<int, kLoads>{}, c);
  }
  if constexpr (!Loss::kPadsPlanes) {
    RK_NO_UNROLL
    for (; c < classes; ++c) f(std::integral_constant<int, 1>{}, c);
  }
}

// With kKeepsPlanes the first `room` classes of a position are kept for its gradient, and the
// others are read a second time. `room` is a multiple of kClassLoads, or all classes.
template <typename Loss>
__global__ void __launch_bounds__(kPlaneThreads, Loss::kPlaneBlocks)
    planes_kernel(typename Loss::Arguments a, int64_t room) {
  using Logits = typename Loss::Arguments::template Logits<1>;
  RK_SHARED(LossShared, shared);
  Logits* const on_chip = reinterpret_cast<Logits*>(shared + 1) + threadIdx.x;
  const int threads = blockDim.x;
  const int64_t classes = a.classes, length = a.length;
  Loss loss(a);
  double losses = 0;
  for (int64_t position = int64_t{blockIdx.x} * threads + threadIdx.x; position < a.positions;
       position += int64_t{gridDim.x} * threads) {
    const int64_t first = start_of(position, classes, length);
    loss.begin(a, first);
    const auto load = [&]<int kCount>(Logits(&x)[kCount], int64_t c) {
      RK_UNROLL
      for (int k = 0; k < kCount; ++k) x[k] = loss.load(a, c + k, classes, length);
    };
    typename Loss::Sums sums;
    for_planes<Loss>(classes, [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      Logits x[kCount];
      load(x, c);
      RK_UNROLL
      for (int k = 0; k < kCount; ++k) {
        if (Loss::kKeepsPlanes && c + k < room) on_chip[(c + k) * threads] = x[k];
      }
      loss.add_planes(sums, a, c, classes, length, x);
    });
    // The target is read after the classes, which need the registers before.
    const auto target = loss.target(a, position, a.x + first, length);
    losses += finish_position(a, position, target, sums);
    if (!a.gradient) continue;
    const auto gradient = loss.gradient(a, position, target, sums);
    for_planes<Loss>(classes, [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      Logits x[kCount];
      if (Loss::kKeepsPlanes && c + kCount <= room) {
        RK_UNROLL
        for (int k = 0; k < kCount; ++k) x[k] = on_chip[(c + k) * threads];
      } else {
        load(x, c);
      }
      gradient.write_planes(a.gradient + first, c, length, x);
    });
  }
  if (a.sum.loss) sum_losses(losses, a.sum, mean_of_nothing(a.target_sums().labels), shared);
}

// ---- Classes side by side: a warp takes a row, or a block does.

template <typename Loss>
struct alignas(kVectorBytes) RowShared {  // what is kept of rows follows it
  // One half is of the rows that the block works on, the other of its next ones: threads may still
  // read the first half when the second is written.
  Position<compute_t<typename Loss::Gradient::Element>> targets[2][Loss::kRowsABlock];
  typename Loss::RowScratch scratch;
  double losses[Loss::kRowsABlock];  // here, since a thread needs its registers for other things
  LossShared loss;
};

// A row has `lanes` threads, or the whole block where kRowsABlock is 1. KeptRow keeps the first
// `room` vectors or classes of it, whichever it counts in.
template <typename Loss>
__global__ void __launch_bounds__(Loss::kRowThreads, Loss::kRowBlocks)
    rows_kernel(typename Loss::Arguments a, int lanes, int room) {
  constexpr bool kOneRow = Loss::kRowsABlock == 1;
  constexpr int kLoads = Loss::kRowLoads;
  RK_SHARED(RowShared<Loss>, shared);
  const int threads = kOneRow ? static_cast<int>(blockDim.x) : lanes;
  const int thread = kOneRow ? threadIdx.x : static_cast<int>(threadIdx.x) % threads;
  const int row = kOneRow ? 0 : static_cast<int>(threadIdx.x) / threads;
  const int rows = kOneRow ? 1 : static_cast<int>(blockDim.x) / threads;
  Loss loss(a);
  if (thread == 0) shared->losses[row] = 0;
  int turn = 0;
  for (int64_t position = int64_t{blockIdx.x} * rows + row; position < a.positions;
       position += int64_t{gridDim.x} * rows, turn ^= 1) {
    const int64_t first = position * a.classes;
    loss.begin(a, first);
    const typename Loss::Row logits(a, first);
    const typename Loss::KeptRow kept(shared + 1, room, logits);
    if (thread == 0) shared->targets[turn][row] = loss.target(a, position, logits.data, 1);
    typename Loss::Sums mine;
    logits.template each<kLoads>(thread, threads,
                                 [&]<int kCount>(std::integral_constant<int, kCount>, auto place) {
                                   typename Loss::Arguments::template Logits<kCount> x[kLoads];
                                   RK_UNROLL
                                   for (int k = 0; k < kLoads; ++k)
                                     x[k] = logits.template load<kCount>(place + k * threads);
                                   if (a.gradient) {
                                     RK_UNROLL
                                     for (int k = 0; k < kLoads; ++k) {
                                       const auto at = place + k * threads;
                                       if (kept.has(at, kCount)) kept.put(at, x[k]);
                                     }
                                   }
                                   loss.add_row(mine, a, logits, place, threads, x);
                                 });
    const typename Loss::Sums sums = loss.joined(mine, a, threads, shared->scratch, turn);
    const typename Loss::RowTarget target = shared->targets[turn][row];
    if (thread == 0) shared->losses[row] += finish_position(a, position, target, sums);
    if (!a.gradient) continue;
    const auto gradient = loss.gradient(a, position, target, sums);
    logits.template each<1>(
        thread, threads, [&]<int kCount>(std::integral_constant<int, kCount>, auto place) {
          const int64_t c = logits.first_class(place);  // here: later it is computed several times
          typename Loss::Arguments::template Logits<kCount> x;
          if (kept.has(place, kCount)) {
            kept.get(place, x);
          } else {
            x = logits.template load<kCount>(place);
          }
          gradient.write_row(a.gradient + first, c, x);
        });
  }
  if (a.sum.loss) {
    sum_losses(thread == 0 ? shared->losses[row] : 0.0, a.sum,
               mean_of_nothing(a.target_sums().labels), &shared->loss);
  }
}

template <typename Loss>
void launch_walk(const typename Loss::Arguments& a, const LossPlan& plan, cudaStream_t stream) {
  const auto launch = [&](auto kernel, int64_t shared_bytes, auto... arguments) {
    allow_shared_bytes(kernel, shared_bytes);
    RK_LAUNCH(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.threads),
              static_cast<size_t>(shared_bytes), stream, a, arguments...);
  };
  const auto bytes_of = [](size_t bytes) { return static_cast<int64_t>(bytes); };
  if (plan.way == LossPlan::Way::planes) {
    using Logits = typename Loss::Arguments::template Logits<1>;
    launch(planes_kernel<Loss>,
           bytes_of(sizeof(LossShared)) + plan.kept * plan.threads * bytes_of(sizeof(Logits)),
           plan.kept);
  } else {
    launch(rows_kernel<Loss>, bytes_of(sizeof(RowShared<Loss>)) + Loss::KeptRow::bytes(plan.kept),
           plan.lanes, static_cast<int>(plan.kept));
  }
}

}  // namespace cuda
RK_NAMESPACE_END
