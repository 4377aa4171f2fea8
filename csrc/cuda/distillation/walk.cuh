// What distillation does in the walks of loss_forward.cuh.
#pragma once

#include <type_traits>

#include "position.cuh"
#include "reg_kernels/loss_forward.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// The student's and the teacher's row of a position. Their vectors have the same number of
// elements, whatever the types. From `head` to `tail` both rows lie on vector boundaries and go in
// vectors. Before and after, each class goes by itself, so that nothing outside the row comes into
// its sums.
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

  template <int kWidth>
  __device__ DistillationPair<S, T, kWidth> load(int64_t c) const {
    return {load_whole<kWidth>(this->data + c), load_whole<kWidth>(teacher + c)};
  }
  __device__ int64_t first_class(int64_t c) const { return c; }

  // Calls f(count, c) for each part of `thread`, one of `threads`: f takes `count` classes from c
  // on. The count is a constant of the compiler.
  template <int, typename F>
  __device__ void each(int thread, int threads, const F& f) const {
    for (int64_t c = head + thread * kCount; c < tail; c += threads * kCount) {
      f(std::integral_constant<int, kCount>{}, c);
    }
    const int64_t ends = head + (this->classes - tail);
    for (int64_t i = thread; i < ends; i += threads) {
      f(std::integral_constant<int, 1>{}, i < head ? i : tail + (i - head));
    }
  }
};

// Keeps a thread's part of a row in shared memory, as far as there is room: vectors, or single
// logits where the row has no vectors. A thread has the same places in every row, and no other
// thread uses them.
template <typename S, typename T>
struct KeptPairs {
  static constexpr int kRoomUnit = 8;  // elements: a multiple of every type's vector

  S* x;
  T* teacher;
  int64_t room, first;  // first: the class whose place is 0
  int width;            // elements of what is kept

  __device__ KeptPairs(void* memory, int room, const DistillationRow<S, T>& row)
      : x(static_cast<S*>(memory)),
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
    put_vector(x + (c - first), pair.x);
    put_vector(teacher + (c - first), pair.teacher);
  }
  template <int kWidth>
  __device__ void get(int64_t c, DistillationPair<S, T, kWidth>& pair) const {
    pair = {vector_at<kWidth>(x + (c - first)), vector_at<kWidth>(teacher + (c - first))};
  }
};

template <typename S, typename T>
struct DistillationLoss {
  using Arguments = DistillationArguments<S, T>;
  using Gradient = DistillationGradient<S, T>;
  using Sums = DistillationSums<S>;
  using C = compute_t<S>;

  static constexpr int kPlaneBlocks = 0;  // the compiler is left to choose
  static constexpr bool kPadsPlanes = false, kKeepsPlanes = false;

  using Row = DistillationRow<S, T>;
  using KeptRow = KeptPairs<S, T>;
  using RowTarget = const Position<C>&;  // in shared memory: no registers are left
  static constexpr int kRowThreads = sizeof(C) == 8 ? 512 : 768, kRowBlocks = 0;
  static constexpr int kRowLoads = 1, kRowsABlock = 4;
  struct RowScratch {
    struct Largest {
      C x, teacher;
    } largest[kRowThreads / kWarp];
    struct Sum {
      C sum, sum_at_t, teacher_sum, z;
      double smooth;
    } sums[kRowThreads / kWarp];
  };

  const C inverse_temperature;
  int64_t first = 0;  // where the position begins; kernels that kept pointers to it spilled

  explicit __device__ DistillationLoss(const Arguments& a)
      : inverse_temperature(a.factors().inverse_temperature) {}
  __device__ void begin(const Arguments&, int64_t start) { first = start; }
  __device__ Position<C> target(const Arguments& a, int64_t position, const S* x,
                                int64_t stride) const {
    return read_labels(a, position, x, stride);
  }

  __device__ DistillationPair<S, T, 1> load(const Arguments& a, int64_t c, int64_t,
                                            int64_t length) const {
    return a.load_class(first + c * length);
  }

  template <int kCount>
  __device__ void add_planes(Sums& sums, const Arguments& a, int64_t c, int64_t, int64_t,
                             const DistillationPair<S, T, 1> (&pairs)[kCount]) const {
    DistillationLogits<S, T, kCount>(pairs).add_to(sums, a, inverse_temperature, c);
  }

  template <int kCount>
  __device__ void add_row(Sums& sums, const Arguments& a, const Row&, int64_t c, int,
                          const DistillationPair<S, T, kCount> (&pair)[1]) const {
    DistillationLogits(pair[0]).add_to(sums, a, inverse_temperature, c);
  }
  // Merges the sums of a row's `threads` threads: those of a warp, or of the whole block. It is a
  // barrier too: afterwards each of them sees what the others wrote to shared memory before.
  __device__ Sums joined(Sums mine, const Arguments& a, int threads, RowScratch& scratch,
                         int) const {
    const bool smooths = a.labels.smooths();
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    const int warps = threads / kWarp;
    C max = largest_of_lanes(mine.max, kWarp);
    C teacher_max = largest_of_lanes(mine.teacher_max, kWarp);
    if (warps > 1) {
      if (lane == 0) scratch.largest[warp] = {max, teacher_max};
      __syncthreads();
      const bool has = lane < warps;
      max = largest_of_lanes(has ? scratch.largest[lane].x : kLowest<C>, kWarp);
      teacher_max = largest_of_lanes(has ? scratch.largest[lane].teacher : kLowest<C>, kWarp);
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
    if (warps == 1) {
      __syncwarp();
      return mine;
    }
    // Nobody reads the last row's sums any more: since then each thread came to the barrier above.
    if (lane == 0) {
      scratch.sums[warp] = {mine.sum, mine.sum_at_t, mine.teacher_sum, mine.z, mine.smooth};
    }
    __syncthreads();
    const bool has = lane < warps;
    mine.sum = has ? scratch.sums[lane].sum : C(0);
    mine.sum_at_t = has ? scratch.sums[lane].sum_at_t : C(0);
    mine.teacher_sum = has ? scratch.sums[lane].teacher_sum : C(0);
    mine.z = has ? scratch.sums[lane].z : C(0);
    mine.smooth = has ? scratch.sums[lane].smooth : 0.0;
    add_up();
    return mine;
  }

  __device__ Gradient gradient(const Arguments& a, int64_t position, const Position<C>& target,
                               const Sums& sums) const {
    return {a, position, target, sums};
  }
};

}  // namespace cuda
RK_NAMESPACE_END
