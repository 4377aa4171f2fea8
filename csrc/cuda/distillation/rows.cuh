// Distillation where the classes of a position lie side by side: a row of C elements.
#pragma once

#include <algorithm>
#include <type_traits>

#include "position.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

template <typename C>
constexpr int kDistillationThreads = sizeof(C) == 8 ? 512 : 768;  // at most
constexpr int kWarpRows = 4;  // of a block, at most, where a warp takes a row

// A row in vectors of as many elements of each type. From `head` to `tail` its logits, the
// student's and the teacher's, lie on vector boundaries; elsewhere each goes by itself.
template <typename S, typename T>
struct DistillationRow {
  static constexpr int kCount = std::min(kVector<S>, kVector<T>);

  const S* x;
  const T* teacher;
  S* gradient;
  int64_t classes, head, tail;

  __device__ DistillationRow(const DistillationArguments<S, T>& a, int64_t position)
      : x(a.x + position * a.classes),
        teacher(a.teacher + position * a.classes),
        gradient(a.gradient ? a.gradient + position * a.classes : nullptr),
        classes(a.classes) {
    const int lead = past_boundary(x);
    head = lead ? kCount - lead : 0;
    if (past_boundary(teacher) != lead || head > classes) head = classes;
    tail = head + (classes - head) / kCount * kCount;
  }

  // Calls f of a count, as a constant, and a class for what `thread` of `threads` is to do.
  template <typename F>
  __device__ void each(int thread, int threads, F&& f) const {
    for (int64_t c = head + thread * kCount; c < tail; c += threads * kCount) {
      f(std::integral_constant<int, kCount>{}, c);
    }
    const int64_t ends = head + (classes - tail);
    for (int64_t i = thread; i < ends; i += threads) {
      f(std::integral_constant<int, 1>{}, i < head ? i : tail + (i - head));
    }
  }

 private:
  template <typename E>
  static __device__ int past_boundary(const E* data) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(data) / sizeof(E) % kCount);
  }
};

// What a thread keeps of a row in shared memory, as far as there is room: vectors, or single logits
// where a row has no vectors. A thread has the same places in every row, and nobody else has them.
template <typename S, typename T>
struct KeptRow {
  static constexpr int kRoomUnit = 8;  // elements: whole vectors of any type

  S* x;
  T* teacher;
  int64_t room, first;  // first: the class whose place is 0
  int width;            // elements of what is kept

  __device__ KeptRow(unsigned char* memory, int room, const DistillationRow<S, T>& row)
      : x(reinterpret_cast<S*>(memory)),
        teacher(reinterpret_cast<T*>(x + room)),
        room(room),
        first(row.head < row.classes ? row.head : 0),
        width(row.head < row.classes ? DistillationRow<S, T>::kCount : 1) {}

  static int64_t bytes(int64_t room) { return room * static_cast<int64_t>(sizeof(S) + sizeof(T)); }

  __device__ bool has(int64_t c, int count) const {
    return count == width && c - first + count <= room;
  }

  template <int kWidth>
  __device__ void put(int64_t c, const Vector<S, kWidth>& xs, const Vector<T, kWidth>& ts) const {
    put_at(x + (c - first), xs);
    put_at(teacher + (c - first), ts);
  }
  template <int kWidth>
  __device__ Vector<S, kWidth> x_at(int64_t c) const {
    return at<kWidth>(x + (c - first));
  }
  template <int kWidth>
  __device__ Vector<T, kWidth> teacher_at(int64_t c) const {
    return at<kWidth>(teacher + (c - first));
  }

 private:
  template <int kWidth, typename E>
  static __device__ void put_at(E* to, const Vector<E, kWidth>& value) {
    if constexpr (kWidth == 1) {
      *to = value.v[0];
    } else {
      using B = Bits<kWidth * sizeof(E)>;
      *reinterpret_cast<B*>(to) = bit_cast<B>(value);
    }
  }
  template <int kWidth, typename E>
  static __device__ Vector<E, kWidth> at(const E* from) {
    if constexpr (kWidth == 1) {
      return {{*from}};
    } else {
      using B = Bits<kWidth * sizeof(E)>;
      const B bits = *reinterpret_cast<const B*>(from);
      return bit_cast<Vector<E, kWidth>>(bits);
    }
  }
};

template <typename C>
struct alignas(kVectorBytes) DistillationShared {  // what is kept of a row follows it
  // Of the rows that a block works on side by side, and, in turn, of those that come next: threads
  // may still read the former.
  PositionTerms<C> terms[2][kWarpRows];
  struct Largest {
    C x, teacher;
  } largest[kDistillationThreads<C> / kWarp];
  struct Sum {
    C sum, sum_at_t, teacher_sum, z;
    double smooth;
  } sums[kDistillationThreads<C> / kWarp];
  LossShared loss;
};

// What `threads` threads have seen of a row, a warp or the whole block. What they have written to
// shared memory before is there afterwards.
template <typename S, typename C>
__device__ __forceinline__ void join(DistillationSums<S>& mine, int threads, C inverse_temperature,
                                     bool smooths, DistillationShared<C>* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int warps = threads / kWarp;
  C max = largest_of_lanes(mine.max, kWarp);
  C teacher_max = largest_of_lanes(mine.teacher_max, kWarp);
  if (warps > 1) {
    if (lane == 0) shared->largest[warp] = {max, teacher_max};
    __syncthreads();
    const bool has = lane < warps;
    max = largest_of_lanes(has ? shared->largest[lane].x : kLowest<C>, kWarp);
    teacher_max = largest_of_lanes(has ? shared->largest[lane].teacher : kLowest<C>, kWarp);
  }
  mine.raise(max, teacher_max, inverse_temperature);
  const auto add_up = [&] {
    mine.sum = sum_of_lanes(mine.sum, kWarp);
    mine.sum_at_t = sum_of_lanes(mine.sum_at_t, kWarp);
    mine.teacher_sum = sum_of_lanes(mine.teacher_sum, kWarp);
    mine.z = sum_of_lanes(mine.z, kWarp);
    if (smooths) mine.smooth = sum_of_lanes(mine.smooth, kWarp);
  };
  add_up();
  if (warps == 1) return __syncwarp();
  // Those who still read what is overwritten here have to come to the barrier above first.
  if (lane == 0) {
    shared->sums[warp] = {mine.sum, mine.sum_at_t, mine.teacher_sum, mine.z, mine.smooth};
  }
  __syncthreads();
  const bool has = lane < warps;
  mine.sum = has ? shared->sums[lane].sum : C(0);
  mine.sum_at_t = has ? shared->sums[lane].sum_at_t : C(0);
  mine.teacher_sum = has ? shared->sums[lane].teacher_sum : C(0);
  mine.z = has ? shared->sums[lane].z : C(0);
  mine.smooth = has ? shared->sums[lane].smooth : 0.0;
  add_up();
}

template <typename S, typename T>
__global__ void __launch_bounds__(kDistillationThreads<compute_t<S>>)
    distillation_rows_kernel(DistillationArguments<S, T> a) {
  using C = compute_t<S>;
  RK_SHARED(DistillationShared<C>, shared);
  const int row = static_cast<int>(threadIdx.x) / a.threads;
  const int thread = static_cast<int>(threadIdx.x) % a.threads;
  const int rows = static_cast<int>(blockDim.x) / a.threads;
  const bool smooths = a.labels.smooths();
  const int64_t stride = int64_t{gridDim.x} * rows;
  const C inverse_temperature = a.factors().inverse_temperature;
  double loss = 0;
  int turn = 0;
  for (int64_t p = int64_t{blockIdx.x} * rows + row; p < a.positions; p += stride, turn ^= 1) {
    const DistillationRow<S, T> logits(a, p);
    const KeptRow<S, T> kept(reinterpret_cast<unsigned char*>(shared + 1), a.room, logits);
    PositionTerms<C>& terms = shared->terms[turn][row];
    if (thread == 0) terms = position_terms(a, p);

    DistillationSums<S> sums;
    if (a.forward) {
      logits.each(
          thread, a.threads, [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
            const auto xs = load_whole<kCount>(logits.x + c);
            const auto teachers = load_whole<kCount>(logits.teacher + c);
            if (kept.has(c, kCount)) kept.put(c, xs, teachers);
            DistillationLogits<S, T, kCount>(xs, teachers).add_to(sums, a, inverse_temperature, c);
          });
      join(sums, a.threads, inverse_temperature, smooths, shared);
      if (thread == 0) loss += finish_position(a, p, terms, sums);
    } else {
      sums = read_stats(a, p);
      a.threads > kWarp ? __syncthreads() : __syncwarp();
    }
    if (a.gradient == nullptr) continue;

    const DistillationSlopes<S> slopes(terms, sums, a.factors());
    logits.each(thread, a.threads, [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      const bool has = kept.has(c, kCount);
      const auto xs = has ? kept.template x_at<kCount>(c) : load_whole<kCount>(logits.x + c);
      const auto teachers =
          has ? kept.template teacher_at<kCount>(c) : load_whole<kCount>(logits.teacher + c);
      store_classes(logits.gradient, c, a.classes,
                    DistillationLogits<S, T, kCount>(xs, teachers).gradient(slopes, a, c));
    });
  }
  if (a.sum.loss) sum_losses(loss, a.sum, mean_of_nothing(a.sums().labels), &shared->loss);
}

}  // namespace cuda
RK_NAMESPACE_END
