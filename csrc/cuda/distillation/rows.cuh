// Distillation where the classes of a position lie side by side: a row of C elements.
#pragma once

#include <type_traits>

#include "position.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

template <typename C>
constexpr int kDistillationThreads = sizeof(C) == 8 ? 512 : 768;  // at most
constexpr int kWarpRows = 4;  // of a block, at most, where a warp takes a row

// Both rows of a position, in vectors of as many elements of each type. What lies outside of a row
// has no place in its sums: from `head` to `tail` both rows lie on vector boundaries; elsewhere
// each class goes by itself.
template <typename S, typename T>
struct DistillationRow : LogitRow<S, DistillationArguments<S, T>::kCount> {
  static constexpr int kCount = DistillationArguments<S, T>::kCount;

  const T* teacher;
  int64_t head, tail;

  __device__ DistillationRow(const DistillationArguments<S, T>& a, int64_t first)
      : LogitRow<S, kCount>(a.x + first, a.classes), teacher(a.teacher + first) {
    const LogitRow<T, kCount> of_teacher(teacher, a.classes);
    head = this->shift ? kCount - this->shift : 0;
    if (of_teacher.shift != this->shift || head > a.classes) head = a.classes;
    tail = head + (a.classes - head) / kCount * kCount;
  }

  // Calls f of a count, as a constant, and a class for what `thread` of `threads` is to do.
  template <typename F>
  __device__ void each(int thread, int threads, F&& f) const {
    for (int64_t c = head + thread * kCount; c < tail; c += threads * kCount) {
      f(std::integral_constant<int, kCount>{}, c);
    }
    const int64_t ends = head + (this->classes - tail);
    for (int64_t i = thread; i < ends; i += threads) {
      f(std::integral_constant<int, 1>{}, i < head ? i : tail + (i - head));
    }
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
  __device__ void put(int64_t c, const DistillationPair<S, T, kWidth>& pair) const {
    put_at(x + (c - first), pair.x);
    put_at(teacher + (c - first), pair.teacher);
  }
  template <int kWidth>
  __device__ DistillationPair<S, T, kWidth> get(int64_t c) const {
    return {at<kWidth>(x + (c - first)), at<kWidth>(teacher + (c - first))};
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
  Position<C> targets[2][kWarpRows];
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

// Rows of `threads` threads each: a warp, or the whole block, which keeps `room` classes.
template <typename S, typename T>
__global__ void __launch_bounds__(kDistillationThreads<compute_t<S>>)
    distillation_rows_kernel(DistillationArguments<S, T> a, int threads, int room) {
  using C = compute_t<S>;
  RK_SHARED(DistillationShared<C>, shared);
  const int row = static_cast<int>(threadIdx.x) / threads;
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const int rows = static_cast<int>(blockDim.x) / threads;
  const bool smooths = a.labels.smooths();
  const int64_t stride = int64_t{gridDim.x} * rows;
  const C inverse_temperature = a.factors().inverse_temperature;
  double loss = 0;
  int turn = 0;
  int64_t p = int64_t{blockIdx.x} * rows + row;
  // Where its class 0 lies, carried along: the loops over classes would multiply it out again.
  int64_t first = p * a.classes;
  for (; p < a.positions; p += stride, first += stride * a.classes, turn ^= 1) {
    const DistillationRow<S, T> logits(a, first);
    const KeptRow<S, T> kept(reinterpret_cast<unsigned char*>(shared + 1), room, logits);
    Position<C>& target = shared->targets[turn][row];
    if (thread == 0) target = read_labels(a, p, logits.data, 1);

    const auto load_pair = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      return DistillationPair<S, T, kCount>{load_whole<kCount>(logits.data + c),
                                            load_whole<kCount>(logits.teacher + c)};
    };
    DistillationSums<S> sums;
    logits.each(thread, threads,
                [&]<int kCount>(std::integral_constant<int, kCount> count, int64_t c) {
                  const auto pair = load_pair(count, c);
                  if (kept.has(c, kCount)) kept.put(c, pair);
                  DistillationLogits(pair).add_to(sums, a, inverse_temperature, c);
                });
    join(sums, threads, inverse_temperature, smooths, shared);
    if (thread == 0) loss += finish_position(a, p, target, sums);
    if (a.gradient == nullptr) continue;

    const DistillationGradient<S, T> gradient(a, p, target, sums);
    logits.each(thread, threads,
                [&]<int kCount>(std::integral_constant<int, kCount> count, int64_t c) {
                  const auto pair =
                      kept.has(c, kCount) ? kept.template get<kCount>(c) : load_pair(count, c);
                  store_anywhere(a.gradient + first + c, gradient.of_whole(c, pair));
                });
  }
  if (a.sum.loss) sum_losses(loss, a.sum, mean_of_nothing(a.target_sums().labels), &shared->loss);
}

}  // namespace cuda
RK_NAMESPACE_END
