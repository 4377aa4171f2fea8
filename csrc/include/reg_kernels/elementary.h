// exp, the error function, roots, a fused sum and a quotient, for the CPU and the CUDA kernels.
//
// In float on the host they are polynomials without a branch, so that a plain loop over them
// becomes vector code for every instruction set; elsewhere they are the library's own.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

RK_NAMESPACE_BEGIN

RK_HD double exponential(double x) { return ::exp(x); }

// Within 1.1 ulp, subnormal results included; 0 and infinity past the ends, NaN for NaN.
RK_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // x = n ln 2 + r, |r| <= ln 2 / 2. Past these ends the result is 0 or infinity anyway.
  x = x > 104.0f ? 104.0f : x;
  x = x < -104.0f ? -104.0f : x;
  constexpr float kRounder = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  const float rounded = x * 1.44269504f + kRounder;
  const float n = rounded - kRounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2, high part exact
  float p = 1.0f / 5040.0f;                                     // Taylor's series up to r^7
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches from -150 to 150, a float's own exponent only from -126 to 127.
  const int32_t exponent = bit_cast<int32_t>(rounded) - bit_cast<int32_t>(kRounder);
  const int32_t half = exponent >> 1;
  const float first = bit_cast<float>((half + 127) << 23);
  const float second = bit_cast<float>((exponent - half + 127) << 23);
  return p * first * second;
#endif
}

RK_HD double error_function(double x) { return ::erf(x); }

// Within 1e-7, absolutely. The coefficients are minimax fits of erf(x) / x in x^2 up to 1 and of
// ln(1 - erf(x)) from 1 to 4, where a float's erf becomes 1.
RK_HD float error_function(float x) {
#if defined(__CUDA_ARCH__)
  return erff(x);
#else
  const float a = x < 0.0f ? -x : x;
  const float s = x * x;
  float near = 7.889119545e-05f;
  near = near * s + -8.020841284e-04f;
  near = near * s + 5.189535340e-03f;
  near = near * s + -2.685444459e-02f;
  near = near * s + 1.128360018e-01f;
  near = near * s + -3.761262714e-01f;
  near = near * s + 1.128379166e+00f;
  near = near * x;
  const float t = a > 4.0f ? 4.0f : a;
  float log_rest = -2.168600998e-05f;
  log_rest = log_rest * t + 4.413265179e-04f;
  log_rest = log_rest * t + -4.204513437e-03f;
  log_rest = log_rest * t + 2.520812743e-02f;
  log_rest = log_rest * t + -1.084183745e-01f;
  log_rest = log_rest * t + -6.332200803e-01f;
  log_rest = log_rest * t + -1.129578330e+00f;
  log_rest = log_rest * t + 1.880202642e-04f;
  const float far = 1.0f - exponential(log_rest);
  return a < 1.0f ? near : (x < 0.0f ? -far : far);  // a NaN fails `<`: t and far are NaN with it
#endif
}

RK_HD double square_root(double x) { return ::sqrt(x); }
RK_HD float square_root(float x) { return ::sqrtf(x); }

// a b + c, rounded once. Without the instruction, in float by way of double, where the product is
// exact: the same but for one sum in 2^29 that lies all but in the middle of two floats.
RK_HD double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

RK_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return ::fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

RK_HD double reciprocal(double x) { return 1.0 / x; }

// On the device within 1 ulp, in one instruction; 0 where the result would be subnormal.
RK_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// a / b; on the device in float as a product, where a division is a dozen instructions and a call.
RK_HD double quotient(double a, double b) { return a / b; }

RK_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return a * reciprocal(b);
#else
  return a / b;
#endif
}

RK_NAMESPACE_END
