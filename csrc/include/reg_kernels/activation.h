// The activations that the fused kernels apply, and their derivatives; torch's formulas.
#pragma once

#include "elementary.h"

RK_NAMESPACE_BEGIN

// The values that the ops' schemas pass; reg_kernels/_activation.py holds the same.
enum class Activation : int64_t { none = 0, relu = 1, leaky_relu = 2, silu = 3, gelu = 4 };

// Linear on both sides of 0: one bit, the sign, is all that the derivative depends on.
RK_HD constexpr bool is_piecewise_linear(Activation a) {
  return a == Activation::none || a == Activation::relu || a == Activation::leaky_relu;
}

// Phi(z), the normal distribution's cumulative function.
template <typename C>
RK_HD C normal_cdf(C z) {
  return C(0.5) * (C(1) + error_function(z * C(0.70710678118654752440)));
}

// C is float or double; `slope` is leaky_relu's below zero. NaN goes through each.
template <Activation kActivation, typename C>
RK_HD C activate(C z, C slope) {
  if constexpr (kActivation == Activation::relu) {
    return z <= C(0) ? C(0) : z;
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return z > C(0) ? z : z * slope;
  } else if constexpr (kActivation == Activation::silu) {
    return quotient(z, C(1) + exponential(-z));
  } else if constexpr (kActivation == Activation::gelu) {
    return z * normal_cdf(z);
  } else {
    return z;
  }
}

// d activate / d z, at 0 from below, as torch takes it.
template <Activation kActivation, typename C>
RK_HD C activation_derivative(C z, C slope) {
  if constexpr (kActivation == Activation::relu) {
    return z <= C(0) ? C(0) : C(1);
  } else if constexpr (kActivation == Activation::leaky_relu) {
    return z > C(0) ? C(1) : slope;
  } else if constexpr (kActivation == Activation::silu) {
    const C sigmoid = quotient(C(1), C(1) + exponential(-z));
    return sigmoid * (C(1) + z * (C(1) - sigmoid));
  } else if constexpr (kActivation == Activation::gelu) {
    const C density = C(0.39894228040143267794) * exponential(C(-0.5) * z * z);
    return normal_cdf(z) + z * density;
  } else {
    return C(1);
  }
}

// Calls f.template operator()<kActivation>() for the activation that is known at run time.
template <typename F>
RK_HD void for_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f.template operator()<Activation::none>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::leaky_relu: return f.template operator()<Activation::leaky_relu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
  }
}

RK_NAMESPACE_END
