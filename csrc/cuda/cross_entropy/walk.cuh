// What cross-entropy does in the walks of loss_forward.cuh: over classes that lie apart, and over
// long rows, each of which a whole block takes.
#pragma once

#include <type_traits>

#include "position.cuh"
#include "reg_kernels/loss_forward.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Keeps the first `kept` vectors of a row.
template <typename T>
struct KeptVectors {
  T* data;
  int kept;

  __device__ KeptVectors(void* memory, int kept, const LogitRow<T>&)
      : data(static_cast<T*>(memory)), kept(kept) {}

  static int64_t bytes(int64_t vectors) { return vectors * kVectorBytes; }

  __device__ bool has(int vector, int) const { return vector < kept; }
  __device__ void put(int vector, const Vector<T>& x) const {
    put_vector(data + vector * kVector<T>, x);
  }
  __device__ void get(int vector, Vector<T>& x) const {
    x = vector_at<kVector<T>>(data + vector * kVector<T>);
  }
};

template <bool kDense, typename T>
struct CrossEntropyLoss {
  using Arguments = CrossEntropy<T>;
  using Gradient = CrossEntropyGradient<kDense, T>;
  using Sums = ClassSums<T, kDense>;
  using C = compute_t<T>;

  static constexpr int kPlaneBlocks = cuda::kPlaneBlocks;
  static constexpr bool kPadsPlanes = true, kKeepsPlanes = true;

  using Row = LogitRow<T>;
  using KeptRow = KeptVectors<T>;
  using RowTarget = Position<C>;
  static constexpr int kRowThreads = 512, kRowBlocks = kDense ? 1 : 2;
  static constexpr int kRowLoads = kLongLoads, kRowsABlock = 1;
  struct RowScratch {
    Sums sums[2][kRowThreads / kWarp];  // rows use them in turn: one barrier a row is enough
  };

  const T* x = nullptr;  // at the position's class 0
  DenseTarget<T> classwise;

  explicit __device__ CrossEntropyLoss(const Arguments& a) : classwise(a.weight) {}
  __device__ void begin(const Arguments& a, int64_t first) {
    x = a.x + first;
    classwise = DenseTarget<T>(a, first);
  }
  __device__ Position<C> target(const Arguments& a, int64_t position, const T* x,
                                int64_t stride) const {
    return read_position<kDense>(a, position, x, stride);
  }

  __device__ Vector<T, 1> load(const Arguments&, int64_t c, int64_t classes, int64_t length) const {
    return {{c < classes ? x[c * length] : store<T>(kNoLogit<C>)}};
  }

  template <int kCount>
  __device__ void add_planes(Sums& sums, const Arguments&, int64_t c, int64_t classes,
                             int64_t length, const Vector<T, 1> (&x)[kCount]) const {
    C max = sums.softmax.max;
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) max = larger(reg_kernels::load(x[k].v[0]), max);
    if (max > sums.softmax.max) sums.raise_to(max);
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      if (c + k >= classes) continue;
      const C above_max = reg_kernels::load(x[k].v[0]) - max;
      if constexpr (kDense) sums.add_dense(classwise.at(c + k, length), above_max);
      sums.softmax.sum += softmax_exponential<T>(above_max);
    }
  }

  // Adds kRowLoads vectors of the row: number `vector` and the next ones, `stride` apart.
  __device__ void add_row(Sums& sums, const Arguments&, const Row& row, int vector, int stride,
                          const Vector<T> (&x)[kRowLoads]) const {
    constexpr int kCount = kVector<T>;
    C max = sums.softmax.max;
    RK_UNROLL
    for (int k = 0; k < kRowLoads; ++k) {
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) max = larger(reg_kernels::load(x[k].v[i]), max);
    }
    if (max > sums.softmax.max) sums.raise_to(max);
    RK_UNROLL
    for (int k = 0; k < kRowLoads; ++k) {
      const int64_t c = row.first_class(vector + k * stride);
      C q[kCount];
      if constexpr (kDense) classwise.read(c, row.classes, q);
      C sum = 0;
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const C above_max = reg_kernels::load(x[k].v[i]) - max;
        if constexpr (kDense) {
          if (row.has(c + i)) sums.add_dense(q[i], above_max);
        }
        sum += softmax_exponential<T>(above_max);
      }
      sums.softmax.sum += sum;
    }
  }
  __device__ Sums joined(const Sums& mine, const Arguments&, int, RowScratch& scratch,
                         int turn) const {
    return merge_block(mine, scratch.sums[turn]);
  }

  __device__ Gradient gradient(const Arguments& a, int64_t position, const Position<C>& target,
                               const Sums& sums) const {
    const Slope<C> slope(target, sums.softmax, a.has_probabilities(), sums.mass,
                         a.factor(position));
    return {slope, classwise, a.classes};
  }
};

}  // namespace cuda
RK_NAMESPACE_END
