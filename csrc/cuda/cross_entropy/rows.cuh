// Cross-entropy where the classes of a position lie side by side: rows of C elements.
#pragma once

#include "position.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// ---- Short rows: a warp, or a part of one, keeps a row in registers.

constexpr int kShortThreads = 256;   // at most
constexpr int kShortRegisters = 32;  // of a thread's logits

// Vectors of a thread.
template <typename T>
constexpr int kShortVectors =
    kShortRegisters / (kVector<T> * static_cast<int>(sizeof(compute_t<T>) / sizeof(float)));

// Rows of at most `most` vectors, each of `lanes` threads.
template <bool kDense, typename T>
__global__ void __launch_bounds__(kShortThreads, kDense ? 1 : 2)
    short_rows_kernel(CrossEntropy<T> a, int lanes, int most) {
  using C = compute_t<T>;
  constexpr int kCount = kVector<T>, kVectors = kShortVectors<T>;
  RK_SHARED(LossShared, shared);
  const int64_t classes = a.classes;
  const int thread = threadIdx.x, lane = thread % lanes;
  const int rows_a_block = static_cast<int>(blockDim.x) / lanes;
  double losses = 0;
  // A warp's threads go round together: they exchange what they have.
  for (int64_t first = int64_t{blockIdx.x} * rows_a_block + thread / kWarp * (kWarp / lanes);
       first < a.positions; first += int64_t{gridDim.x} * rows_a_block) {
    const int64_t own = first + thread % kWarp / lanes;
    const bool valid = own < a.positions;
    const int64_t position = valid ? own : a.positions - 1;  // once more, and of no effect
    const LogitRow<T> row(a.x + position * classes, classes);
    Vector<T> x[kVectors];
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (k * lanes < most) x[k] = row.load(k * lanes + lane);
    }
    const Position<C> target = read_position<kDense>(a, position, row.data, 1);

    SoftmaxSum<C> softmax;
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (k * lanes >= most) continue;
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) softmax.max = larger(load(x[k].v[i]), softmax.max);
    }
    softmax.max = largest_of_lanes(softmax.max, lanes);
    const DenseTarget<T> classwise(a, position * classes);
    C e[kVectors][kCount], dense = 0, mass = 0;
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (k * lanes >= most) continue;
      const int64_t c = row.first_class(k * lanes + lane);
      C q[kCount];
      if constexpr (kDense) classwise.read(c, classes, q);
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const C above_max = load(x[k].v[i]) - softmax.max;
        if constexpr (kDense) {
          if (row.has(c + i)) dense += q[i] * above_max;
          mass += q[i];
        }
        e[k][i] = softmax_exponential<T>(above_max);
        softmax.sum += e[k][i];
      }
    }
    softmax.sum = sum_of_lanes(softmax.sum, lanes);
    if constexpr (kDense) {
      dense = sum_of_lanes(dense, lanes);
      mass = sum_of_lanes(mass, lanes);
    }
    if (valid && lane == 0) {
      losses += finish_position(a, position, target, softmax, dense, mass);
    }
    if (!a.gradient || !valid) continue;
    const Slope<C> slope(target, softmax, a.has_probabilities(), mass, a.factor(position));
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (k * lanes >= most) continue;
      const int64_t c = row.first_class(k * lanes + lane);
      C q[kCount];
      if constexpr (kDense) classwise.read(c, classes, q);
      store_classes(a.gradient + position * classes, c, classes,
                    slopes<kDense, T>(slope, c, e[k], q));
    }
  }
  if (a.sum.loss) sum_losses(losses, a.sum, mean_of_nothing(a.target_sums().labels), shared);
}

// ---- Long rows: a block takes a row, and keeps it in shared memory where it writes a gradient.

constexpr int kLongThreads = 512;  // at most

template <typename T, bool kDense>
struct LongShared {
  // In turn, so that one barrier a row is enough.
  ClassSums<T, kDense> scratch[2][kLongThreads / kWarp];
  Position<compute_t<T>> target[2];
  double losses;  // of thread 0, which has registers for more urgent things
  LossShared loss;
};

// What precedes the rows in shared memory: whole vectors.
template <typename T, bool kDense>
constexpr int64_t kLongSharedBytes =
    ceil_div(sizeof(LongShared<T, kDense>), kVectorBytes) * kVectorBytes;

template <bool kDense, typename T>
__device__ __forceinline__ void add_vectors(ClassSums<T, kDense>& sums, const LogitRow<T>& row,
                                            const DenseTarget<T>& classwise,
                                            const Vector<T> (&x)[kLongLoads], int vector,
                                            int stride) {
  using C = compute_t<T>;
  constexpr int kCount = kVector<T>;
  C max = sums.softmax.max;
  RK_UNROLL
  for (int k = 0; k < kLongLoads; ++k) {
    RK_UNROLL
    for (int i = 0; i < kCount; ++i) max = larger(load(x[k].v[i]), max);
  }
  if (max > sums.softmax.max) sums.raise_to(max);
  RK_UNROLL
  for (int k = 0; k < kLongLoads; ++k) {
    const int64_t c = row.first_class(vector + k * stride);
    C q[kCount];
    if constexpr (kDense) classwise.read(c, row.classes, q);
    C sum = 0;
    RK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const C above_max = load(x[k].v[i]) - max;
      if constexpr (kDense) {
        if (row.has(c + i)) sums.add_dense(q[i], above_max);
      }
      sum += softmax_exponential<T>(above_max);
    }
    sums.softmax.sum += sum;
  }
}

// The first `kept` vectors of a row are kept, the rest is read a second time. Of fewer than 2^31.
template <bool kDense, typename T>
__global__ void __launch_bounds__(kLongThreads, kDense ? 1 : 2)
    long_rows_kernel(CrossEntropy<T> a, int kept) {
  using C = compute_t<T>;
  using Shared = LongShared<T, kDense>;
  RK_SHARED(Shared, shared);
  auto* const on_chip = reinterpret_cast<VectorBits*>(reinterpret_cast<unsigned char*>(shared) +
                                                      kLongSharedBytes<T, kDense>);
  const int64_t classes = a.classes;
  const int thread = threadIdx.x;
  const int stride = blockDim.x;
  if (thread == 0) shared->losses = 0;
  int turn = 0;
  for (int64_t position = blockIdx.x; position < a.positions; position += gridDim.x, turn ^= 1) {
    const LogitRow<T> row(a.x + position * classes, classes);
    const DenseTarget<T> classwise(a, position * classes);
    const auto vectors = static_cast<int>(row.vectors());
    if (thread == 0) shared->target[turn] = read_position<kDense>(a, position, row.data, 1);
    ClassSums<T, kDense> mine;
    RK_NO_UNROLL
    for (int vector = thread; vector < vectors; vector += kLongLoads * stride) {
      Vector<T> x[kLongLoads];
      RK_UNROLL
      for (int k = 0; k < kLongLoads; ++k) x[k] = row.load(vector + k * stride);
      if (a.gradient) {
        RK_UNROLL
        for (int k = 0; k < kLongLoads; ++k) {
          if (vector + k * stride < kept) on_chip[vector + k * stride] = bit_cast<VectorBits>(x[k]);
        }
      }
      add_vectors<kDense>(mine, row, classwise, x, vector, stride);
    }
    const ClassSums<T, kDense> all = merge_block(mine, shared->scratch[turn]);
    const Position<C> target = shared->target[turn];
    C dense = 0, mass = 0;
    if constexpr (kDense) dense = all.dense, mass = all.mass;
    if (thread == 0) {
      shared->losses += finish_position(a, position, target, all.softmax, dense, mass);
    }
    if (!a.gradient) continue;
    const CrossEntropyGradient<kDense, T> gradient(
        {target, all.softmax, a.has_probabilities(), mass, a.factor(position)}, classwise, classes);
    RK_NO_UNROLL
    for (int vector = thread; vector < vectors; vector += stride) {
      const int64_t c = row.first_class(vector);
      // What a thread finds here it has left here itself.
      Vector<T> x;
      if (vector < kept) {
        const VectorBits bits = on_chip[vector];
        x = bit_cast<Vector<T>>(bits);
      } else {
        x = row.load(vector);
      }
      store_classes(a.gradient + position * classes, c, classes, gradient.of_row(c, x));
    }
  }
  if (a.sum.loss)
    sum_losses(thread == 0 ? shared->losses : 0.0, a.sum, mean_of_nothing(a.target_sums().labels),
               &shared->loss);
}

}  // namespace cuda
RK_NAMESPACE_END
