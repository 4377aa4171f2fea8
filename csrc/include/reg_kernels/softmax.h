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

// What exponential_below computes in: floats where a multiply-add rounds once; elsewhere doubles
// that hold floats, whose products are exact. The bits are the same, of each of the 2^32 floats.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
using Fused = float;
using FusedBits = uint32_t;
constexpr Fused kRounder = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
RK_HD Fused sum_of_product(Fused a, Fused b, Fused c) { return ::fmaf(a, b, c); }
RK_HD Fused rounded_sum(Fused a, Fused b, Fused c, Fused) { return ::fmaf(a, b, c); }
#else
using Fused = double;
using FusedBits = uint64_t;
constexpr Fused kRounder = 6755399441055744.0;  // 1.5 2^52
RK_HD Fused sum_of_product(Fused a, Fused b, Fused c) { return a * b + c; }
// As a float, `spacing` being that of the floats where the sum lies: a conversion there and back
// takes twice the instructions.
RK_HD Fused rounded_sum(Fused a, Fused b, Fused c, Fused spacing) {
  return (a * b + (c + kRounder * spacing)) - kRounder * spacing;
}
#endif
RK_HD Fused as_float(Fused x) { return static_cast<float>(x); }

// exp(x) of an x that is no larger than 0, as a logit less the largest one is: within 1 ulp, 0
// where it would fall below the normal floats, NaN for NaN. Half the work of `exponential`. The
// coefficients are a minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, within 4e-9.
RK_HD float exponential_below(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  constexpr Fused kBiased = kRounder + 127;  // the last bits of a sum are the exponent's field
  const Fused shifted = sum_of_product(x, 1.44269504f, kBiased);
  const Fused n = shifted - kBiased;
  const Fused r = as_float(sum_of_product(n, 2.12194440e-4f, sum_of_product(n, -0.693359375f, x)));
  Fused p = 1.3814597623e-3f;
  p = rounded_sum(p, r, 8.3687165752e-3f, 0x1p-30f);
  p = rounded_sum(p, r, 4.1668388993e-2f, 0x1p-28f);
  p = rounded_sum(p, r, 1.6666521132e-1f, 0x1p-26f);
  p = as_float(sum_of_product(p, r, 4.9999994040e-1f));
  const float above_one = static_cast<float>(sum_of_product(p, as_float(r * r), r));
  // Times 2^n, a product that keeps a NaN. Of what lies below, n is anything.
  const auto exponent = static_cast<uint32_t>(bit_cast<FusedBits>(shifted));
  const float result = (above_one + 1.0f) * bit_cast<float>(exponent << 23);
  return x < -87.0f ? 0.0f : result;
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
