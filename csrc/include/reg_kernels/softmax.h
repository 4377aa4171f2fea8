// The sum of exponentials that a softmax is divided by, gathered piece by piece.
//
// A largest value of -inf would make exp(-inf - -inf) a NaN where it should be 0; `kLowest` stands
// in for it. If no value at all is above -inf the sum stays 0, and what is divided by it becomes
// NaN, as it is in torch.
#pragma once

#include <cfloat>

#include "elementary.h"

RK_NAMESPACE_BEGIN

template <typename C>
struct LowestOf;
template <>
struct LowestOf<float> {
  static constexpr float value = -FLT_MAX;
};
template <>
struct LowestOf<double> {
  static constexpr double value = -DBL_MAX;
};
template <typename C>
inline constexpr C kLowest = LowestOf<C>::value;

RK_HD float logarithm(float x) { return ::logf(x); }
RK_HD double logarithm(double x) { return ::log(x); }

RK_HD double exponential_below(double x) { return ::exp(x); }

// exp(x) of an x that is no larger than 0, as a logit less the largest one is: within 1 ulp, 0
// where it would fall below the normal floats, NaN for NaN. Half the work of `exponential`. The
// coefficients are a minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, within 4e-9.
RK_HD float exponential_below(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  constexpr float kLeast = -87.0f;
  constexpr float kRounder = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  const float bounded = x < kLeast ? kLeast : x;
  const float rounded = multiply_add(bounded, 1.44269504f, kRounder);
  const float n = rounded - kRounder;
  const float r = multiply_add(n, 2.12194440e-4f, bounded - n * 0.693359375f);
  float p = 1.3814597623e-3f;
  p = multiply_add(p, r, 8.3687165752e-3f);
  p = multiply_add(p, r, 4.1668388993e-2f);
  p = multiply_add(p, r, 1.6666521132e-1f);
  p = multiply_add(p, r, 4.9999994040e-1f);
  p = multiply_add(p, r * r, r) + 1.0f;
  // Times 2^n: in the exponent's field. The rounder's own bits are shifted out.
  const float result = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(rounded) << 23));
  return x >= kLeast ? result : x < kLeast ? 0.0f : x;
#endif
}

// sum = sum of exp(x - max) over the values seen, or of exp((x - max) / T) where the owner says so;
// max is the largest of them.
template <typename C>
struct SoftmaxSum {
  C max = kLowest<C>;
  C sum = 0;

  RK_HD void merge(const SoftmaxSum& other) {
    const C larger = other.max > max ? other.max : max;
    sum = sum * exponential(max - larger) + other.sum * exponential(other.max - larger);
    max = larger;
  }
};

RK_NAMESPACE_END
