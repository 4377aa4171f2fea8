// The losses of logits and, where there is a place for it, their gradient in the same launch: how a
// thread, or several of them, go through the positions and the classes of each.
//
// `Loss` is a loss's: made of its arguments once a thread, then told where each position begins.
// Its Sums are what is gathered of a position's classes: add_planes adds a block of kPlaneLoads
// classes that lie apart. What is past the last class is padded where the loss has kPadsPlanes, and
// is no part of a block otherwise: then what is left comes one by one. Target and sums of a
// position make its loss, by finish_position, and `gradient`, which writes what its classes get.
#pragma once

#include <type_traits>

#include "loss.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Calls f of a count, as a constant, and a class for blocks of classes that a thread goes through.
template <typename Loss, typename F>
__device__ __forceinline__ void for_planes(int64_t classes, const F& f) {
  constexpr int kLoads = Loss::kPlaneLoads;
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

// A thread a position: where classes lie apart, or are but a handful. Of a position its first
// `kept` classes, a whole number of kPlaneLoads or all, are kept in shared memory, where there is a
// gradient to write, and the rest is read a second time: a thread finds what it has left there
// itself.
template <typename Loss>
__global__ void __launch_bounds__(kPlaneThreads, Loss::kPlaneBlocks)
    planes_kernel(typename Loss::Arguments a, int64_t kept) {
  RK_SHARED(LossShared, shared);
  const typename Loss::KeptPlane on_chip(shared + 1, kept);
  const int threads = blockDim.x;
  const int64_t classes = a.classes, length = a.length;
  Loss loss(a);
  double losses = 0;
  for (int64_t position = int64_t{blockIdx.x} * threads + threadIdx.x; position < a.positions;
       position += int64_t{gridDim.x} * threads) {
    const int64_t first = start_of(position, classes, length);
    const auto at = a.position_at(first);
    loss.begin(a, first);
    typename Loss::Sums sums;
    for_planes<Loss>(classes, [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      const auto logits = at.template load<kCount>(c, classes, length);
      on_chip.put(c, logits);
      loss.add_planes(sums, a, c, classes, length, logits);
    });
    const auto target = loss.target(a, position, at.x(), length);
    losses += finish_position(a, position, target, sums);
    if (!a.gradient) continue;
    const auto gradient = loss.gradient(a, position, target, sums);
    for_planes<Loss>(classes, [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      typename Loss::Arguments::template Logits<kCount> logits;
      if (on_chip.has(c, kCount)) {
        on_chip.get(c, logits);
      } else {
        logits = at.template load<kCount>(c, classes, length);
      }
      gradient.write_planes(a.gradient + first, c, length, logits);
    });
  }
  if (a.sum.loss) sum_losses(losses, a.sum, mean_of_nothing(a.target_sums().labels), shared);
}

template <typename Loss>
struct alignas(kVectorBytes) RowShared {  // what is kept of rows follows it
  using C = compute_t<typename Loss::Element>;

  // Of the rows that a block works on side by side. In turn of those that come next, so that
  // threads may still read the former: one barrier a row is enough.
  Position<C> targets[2][Loss::kRowsABlock];
  typename Loss::RowScratch scratch;
  double losses[Loss::kRowsABlock];  // of threads that have registers for more urgent things
  LossShared loss;
};

// Classes side by side: rows of `threads` threads each, a whole block where that has one row, which
// keeps `room` of each row in shared memory where there is a gradient to write. What a thread finds
// there it has left there itself.
template <typename Loss>
__global__ void __launch_bounds__(Loss::kRowThreads, Loss::kRowBlocks)
    rows_kernel(typename Loss::Arguments a, int threads, int room) {
  constexpr bool kOneRow = Loss::kRowsABlock == 1;
  constexpr int kLoads = Loss::kRowLoads;
  using C = compute_t<typename Loss::Element>;
  RK_SHARED(RowShared<Loss>, shared);
  const int row = kOneRow ? 0 : static_cast<int>(threadIdx.x) / threads;
  const int thread = kOneRow ? threadIdx.x : static_cast<int>(threadIdx.x) % threads;
  const int rows = kOneRow ? 1 : static_cast<int>(blockDim.x) / threads;
  const int64_t stride = int64_t{gridDim.x} * rows;
  Loss loss(a);
  if (thread == 0) shared->losses[row] = 0;
  int turn = 0;
  for (int64_t position = int64_t{blockIdx.x} * rows + row; position < a.positions;
       position += stride, turn ^= 1) {
    const int64_t first = position * a.classes;
    loss.begin(a, first);
    const typename Loss::Row logits(a, first);
    const typename Loss::KeptRow kept(shared + 1, room, logits);
    Position<C>& target = shared->targets[turn][row];
    if (thread == 0) target = loss.target(a, position, logits.data, 1);
    typename Loss::Sums mine;
    logits.template each<kLoads>(
        thread, threads, [&]<int kCount>(std::integral_constant<int, kCount>, auto place) {
          typename Loss::Arguments::template Logits<kCount> x[kLoads];
          RK_UNROLL
          for (int k = 0; k < kLoads; ++k) x[k] = logits.template load<kCount>(place + k * threads);
          RK_UNROLL
          for (int k = 0; k < kLoads; ++k) {
            if (kept.has(place + k * threads, kCount)) kept.put(place + k * threads, x[k]);
          }
          loss.add_row(mine, a, logits, place, threads, x);
        });
    const typename Loss::Sums sums = loss.joined(mine, a, threads, shared->scratch, turn);
    if (thread == 0) shared->losses[row] += finish_position(a, position, target, sums);
    if (!a.gradient) continue;
    const auto gradient = loss.gradient(a, position, target, sums);
    logits.template each<1>(
        thread, threads, [&]<int kCount>(std::integral_constant<int, kCount>, auto place) {
          typename Loss::Arguments::template Logits<kCount> x;
          if (kept.has(place, kCount)) {
            kept.get(place, x);
          } else {
            x = logits.template load<kCount>(place);
          }
          gradient.write_row(a.gradient + first, logits.class_of(place), x);
        });
  }
  if (a.sum.loss) {
    sum_losses(thread == 0 ? shared->losses[row] : 0.0, a.sum,
               mean_of_nothing(a.target_sums().labels), &shared->loss);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
