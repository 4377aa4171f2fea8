// Cross-entropy where the classes of a position lie S elements apart, and positions side by side: a
// thread takes a position, and a warp a stretch of each class's plane.
#pragma once

#include "position.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Classes c, c + 1, ... of a position; what is past the last one is -inf.
template <typename T>
__device__ __forceinline__ void load_planes(const T* x, int64_t c, int64_t classes, int64_t stride,
                                            T (&values)[kPlaneLoads]) {
  RK_UNROLL
  for (int k = 0; k < kPlaneLoads; ++k) {
    values[k] = c + k < classes ? x[(c + k) * stride] : store<T>(kNoLogit<compute_t<T>>);
  }
}

// Of a position its first `kept` classes, a whole number of kPlaneLoads or all, are kept in shared
// memory, where there is a gradient to write, and the rest is read a second time: a thread finds
// what it has left there itself.
template <bool kDense, typename T>
__global__ void __launch_bounds__(kPlaneThreads, kPlaneBlocks)
    planes_kernel(CrossEntropy<T> a, int64_t kept) {
  using C = compute_t<T>;
  RK_SHARED(LossShared, shared);
  T* const on_chip = reinterpret_cast<T*>(shared + 1) + threadIdx.x;
  const int threads = blockDim.x;
  const int64_t classes = a.classes, length = a.length;
  double losses = 0;
  for (int64_t position = int64_t{blockIdx.x} * threads + threadIdx.x; position < a.positions;
       position += int64_t{gridDim.x} * threads) {
    const int64_t first = start_of(position, classes, length);
    const T* const x = a.x + first;
    const DenseTarget<T> classwise(a, first);
    ClassSums<T, kDense> all;
    RK_NO_UNROLL
    for (int64_t c = 0; c < classes; c += kPlaneLoads) {
      T values[kPlaneLoads];
      load_planes(x, c, classes, length, values);
      C max = all.softmax.max;
      RK_UNROLL
      for (int k = 0; k < kPlaneLoads; ++k) {
        if (c + k < kept) on_chip[(c + k) * threads] = values[k];
        max = larger(load(values[k]), max);
      }
      if (max > all.softmax.max) all.raise_to(max);
      RK_UNROLL
      for (int k = 0; k < kPlaneLoads; ++k) {
        if (c + k >= classes) continue;
        const C above_max = load(values[k]) - max;
        if constexpr (kDense) all.add_dense(classwise.at(c + k, length), above_max);
        all.softmax.sum += softmax_exponential<T>(above_max);
      }
    }
    const Position<C> target = read_position<kDense>(a, position, x, length);
    C dense = 0, mass = 0;
    if constexpr (kDense) dense = all.dense, mass = all.mass;
    losses += finish_position(a, position, target, all.softmax, dense, mass);
    if (!a.gradient) continue;
    const CrossEntropyGradient<kDense, T> gradient(
        {target, all.softmax, a.has_probabilities(), mass, a.factor(position)}, classwise, classes);
    RK_NO_UNROLL
    for (int64_t c = 0; c < classes; c += kPlaneLoads) {
      T values[kPlaneLoads];
      if (c + kPlaneLoads <= kept) {
        RK_UNROLL
        for (int k = 0; k < kPlaneLoads; ++k) values[k] = on_chip[(c + k) * threads];
      } else {
        load_planes(x, c, classes, length, values);
      }
      RK_UNROLL
      for (int k = 0; k < kPlaneLoads; ++k) {
        if (c + k >= classes) continue;
        a.gradient[first + (c + k) * length] = gradient.of_class(c + k, length, {{values[k]}});
      }
    }
  }
  if (a.sum.loss) sum_losses(losses, a.sum, mean_of_nothing(a.target_sums().labels), shared);
}

}  // namespace cuda
RK_NAMESPACE_END
