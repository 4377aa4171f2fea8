// Sums over many elements in double, eight at a time. The order is the same on every instruction
// set, so that all of them give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/dtypes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

RK_NAMESPACE_BEGIN

constexpr int kLanes = 8;

// How many of the lanes one register holds. Loops with many sums take one such part of the lanes
// after the other, since sums that find no register go through memory.
#if defined(__AVX512F__)
constexpr int kPartLanes = 8;
#elif defined(__AVX2__)
constexpr int kPartLanes = 4;
#else
constexpr int kPartLanes = 2;
#endif
typedef double PartOfDoubles __attribute__((vector_size(kPartLanes * sizeof(double))));

// All lanes, each part of them a register. Of one vector type as wide as all of them g++ 12 keeps
// the values in memory where that is wider than a register.
struct Doubles {
  static constexpr int kParts = kLanes / kPartLanes;
  PartOfDoubles parts[kParts];

  template <typename F>
  static RK_HD Doubles of(const F& part) {
    Doubles v;
#pragma GCC unroll 4
    for (int k = 0; k < kParts; ++k) v.parts[k] = part(k);
    return v;
  }
  RK_HD Doubles operator+(const Doubles& v) const {
    return of([&](int k) __attribute__((always_inline)) { return parts[k] + v.parts[k]; });
  }
  RK_HD Doubles operator-(const Doubles& v) const {
    return of([&](int k) __attribute__((always_inline)) { return parts[k] - v.parts[k]; });
  }
  RK_HD Doubles operator*(const Doubles& v) const {
    return of([&](int k) __attribute__((always_inline)) { return parts[k] * v.parts[k]; });
  }
  RK_HD Doubles& operator+=(const Doubles& v) { return *this = *this + v; }
};

#if defined(__AVX2__)

// Loads eight elements as floats; narrower types are widened.
typedef __m256 Floats;
RK_HD Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
RK_HD Floats load_floats(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RK_HD Floats load_floats(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Stores eight floats, as float16 rounded to nearest even; a NaN becomes the one of dtypes.h.
RK_HD void store_floats(float* p, Floats floats) { _mm256_storeu_ps(p, floats); }
RK_HD void store_floats(float16* p, Floats floats) {
  const __m256 nan = _mm256_cmp_ps(floats, floats, _CMP_UNORD_Q);
  const __m256 sign = _mm256_and_ps(floats, _mm256_set1_ps(-0.0f));
  const __m256 quiet = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __m128i bits = _mm256_cvtps_ph(_mm256_blendv_ps(floats, quiet, nan),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

// By hand: g++ 12 takes a wide conversion to pieces.
RK_HD Doubles widen(Floats floats) {
#if defined(__AVX512F__)
  return {{_mm512_cvtps_pd(floats)}};
#else
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(floats)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1))}};
#endif
}

#elif defined(__aarch64__)

struct Floats {
  float32x4_t low, high;
};
RK_HD Floats load_floats(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
RK_HD Floats load_floats(const float16* p) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
RK_HD Floats load_floats(const bfloat16* p) {
  const uint16x8_t bits = vld1q_u16(&p->bits);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}

RK_HD float32x4_t with_quiet_nan(float32x4_t floats) {
  const uint32x4_t bits = vreinterpretq_u32_f32(floats);
  const uint32x4_t nan = vbslq_u32(vdupq_n_u32(0x80000000u), bits, vdupq_n_u32(0x7fc00000u));
  return vreinterpretq_f32_u32(vbslq_u32(vceqq_f32(floats, floats), bits, nan));
}
RK_HD void store_floats(float* p, Floats floats) {
  vst1q_f32(p, floats.low);
  vst1q_f32(p + 4, floats.high);
}
RK_HD void store_floats(float16* p, Floats floats) {
  const float16x4_t low = vcvt_f16_f32(with_quiet_nan(floats.low));
  const float16x8_t halves = vcvt_high_f16_f32(low, with_quiet_nan(floats.high));
  vst1q_u16(&p->bits, vreinterpretq_u16_f16(halves));
}

RK_HD Doubles widen(Floats floats) {
  return {{vcvt_f64_f32(vget_low_f32(floats.low)), vcvt_high_f64_f32(floats.low),
           vcvt_f64_f32(vget_low_f32(floats.high)), vcvt_high_f64_f32(floats.high)}};
}

#endif

// kPartLanes elements at p.
RK_HD PartOfDoubles part_at(const double* p) {
  PartOfDoubles v;
  memcpy(&v, p, sizeof(v));
  return v;
}

#if defined(__AVX512F__)
template <typename T>
RK_HD PartOfDoubles part_at(const T* p) {
  return widen(load_floats(p)).parts[0];
}
#elif defined(__AVX2__)
RK_HD PartOfDoubles part_at(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
RK_HD PartOfDoubles part_at(const float16* p) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
RK_HD PartOfDoubles part_at(const bfloat16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16)));
}
#elif defined(__aarch64__)
// Two elements of 16 bits in a vector's low part.
RK_HD uint16x4_t two_words(const void* p) {
  uint32_t bits;
  memcpy(&bits, p, sizeof(bits));
  return vreinterpret_u16_u32(vdup_n_u32(bits));
}
RK_HD PartOfDoubles part_at(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
RK_HD PartOfDoubles part_at(const float16* p) {
  return vcvt_f64_f32(vget_low_f32(vcvt_f32_f16(vreinterpret_f16_u16(two_words(p)))));
}
RK_HD PartOfDoubles part_at(const bfloat16* p) {
  const uint32x4_t bits = vshll_n_u16(two_words(p), 16);
  return vcvt_f64_f32(vget_low_f32(vreinterpretq_f32_u32(bits)));
}
#else
template <typename T>
RK_HD PartOfDoubles part_at(const T* p) {
  return PartOfDoubles{static_cast<double>(load(p[0])), static_cast<double>(load(p[1]))};
}
#endif

// `value_at<V>(p)`: the eight elements at p as V = Doubles, or the one as V = double.
template <typename V, typename T>
RK_HD V value_at(const T* p) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return static_cast<double>(load(*p));
  } else {
    if constexpr (sizeof(T) < sizeof(float)) {  // several parts by one instruction
#if defined(__AVX2__) || defined(__aarch64__)
      return widen(load_floats(p));
#else
      float floats[kLanes];
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) floats[j] = load(p[j]);
      return value_at<V>(floats);
#endif
    }
    return V::of([=](int k) __attribute__((always_inline)) { return part_at(p + k * kPartLanes); });
  }
}

template <typename V>
RK_HD void put_value(double* p, const V& v) {
  memcpy(p, &v, sizeof(V));
}

// Calls f(V{}, i) for i from 0 to count, in steps of eight as Doubles, then one by one as double.
template <typename F>
RK_HD void for_lanes(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(Doubles{}, i);
  for (; i < count; ++i) f(double{}, i);
}

RK_HD double sum_of_lanes(const Doubles& lanes) {
  double v[kLanes];
  memcpy(v, &lanes, sizeof(v));
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

RK_NAMESPACE_END
