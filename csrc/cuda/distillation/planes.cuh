// Distillation with a thread a position: where classes lie apart, or are but a handful.
#pragma once

#include <type_traits>

#include "position.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

template <typename S, typename T>
__global__ void __launch_bounds__(kPlaneThreads)
    distillation_planes_kernel(DistillationArguments<S, T> a) {
  using C = compute_t<S>;
  RK_SHARED(LossShared, shared);
  // At a time, as far as there are: loads that wait for nothing, where registers allow.
  constexpr int kClasses = kDistillationClasses<C>;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const C inverse_temperature = a.factors().inverse_temperature;
  double loss = 0;
  for (int64_t p = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; p < a.positions; p += stride) {
    // In this form it leaves kernels more registers; those of cross-entropy, in start_of's.
    const int64_t n = p / a.length, start = n * a.classes * a.length + (p - n * a.length);
    const auto each = [&](const auto& f) {
      int64_t c = 0;
      RK_NO_UNROLL
      for (; c + kClasses <= a.classes; c += kClasses) {
        f(std::integral_constant<int, kClasses>{}, c);
      }
      RK_NO_UNROLL
      for (; c < a.classes; ++c) f(std::integral_constant<int, 1>{}, c);
    };
    const auto pair_at = [&]<int kCount>(std::integral_constant<int, kCount>, int64_t c) {
      DistillationPair<S, T, kCount> pair;
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) {
        pair.x.v[j] = a.x[start + (c + j) * a.length];
        pair.teacher.v[j] = a.teacher[start + (c + j) * a.length];
      }
      return pair;
    };

    const Position<C> target = read_labels(a, p, a.x + start, a.length);
    DistillationSums<S> sums;
    each([&](auto count, int64_t c) {
      DistillationLogits(pair_at(count, c)).add_to(sums, a, inverse_temperature, c);
    });
    loss += finish_position(a, p, target, sums);
    if (a.gradient == nullptr) continue;
    const DistillationGradient<S, T> gradient(a, p, target, sums);
    each([&]<int kCount>(std::integral_constant<int, kCount> count, int64_t c) {
      const auto slopes = gradient.of_whole(c, pair_at(count, c));
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) a.gradient[start + (c + j) * a.length] = slopes.v[j];
    });
  }
  if (a.sum.loss) sum_losses(loss, a.sum, mean_of_nothing(a.target_sums().labels), shared);
}

}  // namespace cuda
RK_NAMESPACE_END
