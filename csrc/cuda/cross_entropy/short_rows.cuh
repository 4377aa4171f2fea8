// Cross-entropy of short rows: where the classes of a position lie side by side, a warp, or a part
// of one, keeps them in registers.
#pragma once

#include "position.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

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

    ClassSums<T, kDense> sums;
    SoftmaxSum<C>& softmax = sums.softmax;
    RK_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      if (k * lanes >= most) continue;
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) softmax.max = larger(load(x[k].v[i]), softmax.max);
    }
    softmax.max = largest_of_lanes(softmax.max, lanes);
    const DenseTarget<T> classwise(a, position * classes);
    C e[kVectors][kCount];
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
          if (row.has(c + i)) sums.dense += q[i] * above_max;
          sums.mass += q[i];
        }
        e[k][i] = softmax_exponential<T>(above_max);
        softmax.sum += e[k][i];
      }
    }
    softmax.sum = sum_of_lanes(softmax.sum, lanes);
    if constexpr (kDense) {
      sums.dense = sum_of_lanes(sums.dense, lanes);
      sums.mass = sum_of_lanes(sums.mass, lanes);
    }
    if (valid && lane == 0) {
      losses += finish_position(a, position, target, sums);
    }
    if (!a.gradient || !valid) continue;
    const Slope<C> slope(target, softmax, a.has_probabilities(), sums.mass, a.factor(position));
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

}  // namespace cuda
RK_NAMESPACE_END
