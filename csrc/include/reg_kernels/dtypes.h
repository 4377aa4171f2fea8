// The element types: two 16-bit floats that only store, and the type each one computes in.
//
// float16 and bfloat16 are plain bits here, so that the same kernels compile without CUDA's or
// torch's headers. Arithmetic happens in float; `load` and `store` convert, rounding once, to
// nearest even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace reg_kernels {

// An element type that is known at run time. One for all instruction sets: it is handed between
// files that are built for different ones.
enum class DType { float64, float32, float16, bfloat16 };

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <typename T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};

// The type that a T is computed in.
template <typename T>
using compute_t = typename ComputeTypeOf<T>::type;

template <typename To, typename From>
RK_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast between types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A sum that the compiler does not join with a product before it in one rounding.
RK_HD float add_apart(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

RK_HD double add_apart(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

RK_HD double load(double value) { return value; }
RK_HD float load(float value) { return value; }

RK_HD float load(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

RK_HD float load(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  // Shifted so that the exponent lies in a float's field, then scaled by the difference of the two
  // biases, 2^112: exact, subnormals included. Only Inf and NaN need their exponent filled up.
  const uint32_t magnitude = value.bits & 0x7fffu;
  float result = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  if (magnitude >= 0x7c00u) result = bit_cast<float>(0x7f800000u | (magnitude << 13));
  return bit_cast<float>(bit_cast<uint32_t>(result) | ((value.bits & 0x8000u) << 16));
#endif
}

// Calls f with a value of the element type.
template <typename F>
inline auto for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(double{});
    case DType::float32: return f(float{});
    case DType::float16: return f(float16{});
    case DType::bfloat16: break;
  }
  return f(bfloat16{});
}

// store<T>(value): `value` as a T, rounded to nearest even; a NaN stays a NaN.
template <typename T>
struct Store;

template <>
struct Store<double> {
  static RK_HD double from(double value) { return value; }
};

template <>
struct Store<float> {
  static RK_HD float from(float value) { return value; }
};

template <>
struct Store<bfloat16> {
  static RK_HD bfloat16 from(float value) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // Rounding could carry a NaN's mantissa away, so a NaN becomes the quiet one instead.
    return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
#endif
  }
};

template <>
struct Store<float16> {
  static RK_HD float16 from(float value) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const float magnitude = bit_cast<float>(bits & 0x7fffffffu);
    uint32_t half;
    if (bit_cast<uint32_t>(magnitude) > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 65520.0f) {  // the midpoint above the largest finite value
      half = 0x7c00u;
    } else if (magnitude < 6.103515625e-05f) {
      // Adding 0.5 leaves the value in units of 2^-24, the subnormal step, in the low mantissa
      // bits: the float addition has rounded it.
      half = bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000u;
    } else {
      const uint32_t m = bit_cast<uint32_t>(magnitude);
      half = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
  }
};

template <typename T>
RK_HD T store(compute_t<T> value) {
  return Store<T>::from(value);
}

// The same for the product of a T and a number that is not NaN. If that is NaN, its payload is the
// T's own or none and rounding cannot carry it away: no test for NaN, a sixteenth of a loop's time.
template <typename T>
struct StoreProduct : Store<T> {};

template <>
struct StoreProduct<bfloat16> {
  static RK_HD bfloat16 from(float value) {
#if defined(__CUDA_ARCH__)
    return Store<bfloat16>::from(value);
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
  }
};

template <typename T>
RK_HD T store_product(compute_t<T> value) {
  return StoreProduct<T>::from(value);
}

// One number a channel, a weight or a running statistic, of an element type of its own. Read once a
// channel, so the type is looked up each time.
struct ChannelValues {
  void* data;  // [C], or null
  DType dtype;

  RK_HD double at(int64_t c, double where_null) const {
    if (data == nullptr) return where_null;
    switch (dtype) {
      case DType::float64: return static_cast<const double*>(data)[c];
      case DType::float32: return load(static_cast<const float*>(data)[c]);
      case DType::float16: return load(static_cast<const float16*>(data)[c]);
      case DType::bfloat16: return load(static_cast<const bfloat16*>(data)[c]);
    }
    return where_null;
  }

  RK_HD void set(int64_t c, double value) const {
    const auto narrow = static_cast<float>(value);
    switch (dtype) {
      case DType::float64: static_cast<double*>(data)[c] = value; break;
      case DType::float32: static_cast<float*>(data)[c] = narrow; break;
      case DType::float16: static_cast<float16*>(data)[c] = store<float16>(narrow); break;
      case DType::bfloat16: static_cast<bfloat16*>(data)[c] = store<bfloat16>(narrow); break;
    }
  }
};

RK_NAMESPACE_END
