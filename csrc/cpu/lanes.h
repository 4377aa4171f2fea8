// Sums over many elements in double, eight at a time. The order is the same on every instruction
// set, so that all of them give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/dtypes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

RK_NAMESPACE_BEGIN

constexpr int kLanes = 8;
// The compiler splits it over the registers that there are.
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));

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

#if defined(__AVX2__)

// Loads eight elements as floats; narrower types are widened.
RK_HD __m256 load_floats(const float* p) { return _mm256_loadu_ps(p); }
RK_HD __m256 load_floats(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RK_HD __m256 load_floats(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Stores eight floats as float16, rounded to nearest even; a NaN becomes the one of dtypes.h.
RK_HD void store_floats(float16* p, __m256 floats) {
  const __m256 nan = _mm256_cmp_ps(floats, floats, _CMP_UNORD_Q);
  const __m256 sign = _mm256_and_ps(floats, _mm256_set1_ps(-0.0f));
  const __m256 quiet = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __m128i bits = _mm256_cvtps_ph(_mm256_blendv_ps(floats, quiet, nan),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

// By hand: g++ 12 takes a wide conversion to pieces.
RK_HD Doubles widen(__m256 floats) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_cvtps_pd(floats));
#else
  const __m256d halves[2] = {_mm256_cvtps_pd(_mm256_castps256_ps128(floats)),
                             _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1))};
  return bit_cast<Doubles>(halves);
#endif
}

#endif

// `value_at<V>(p)`: the eight elements at p as V = Doubles, or the one as V = double.
template <typename V, typename T>
RK_HD V value_at(const T* p) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return static_cast<double>(load(*p));
  } else if constexpr (sizeof(T) == sizeof(double)) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
  } else {
#if defined(__AVX2__)
    return widen(load_floats(p));
#else
    V v;
    for (int j = 0; j < kLanes; ++j) v[j] = static_cast<double>(load(p[j]));
    return v;
#endif
  }
}

// kPartLanes elements at p.
RK_HD PartOfDoubles part_at(const double* p) {
  PartOfDoubles v;
  memcpy(&v, p, sizeof(v));
  return v;
}

#if defined(__AVX512F__)
template <typename T>
RK_HD PartOfDoubles part_at(const T* p) {
  return widen(load_floats(p));
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
#else
template <typename T>
RK_HD PartOfDoubles part_at(const T* p) {
  return PartOfDoubles{static_cast<double>(load(p[0])), static_cast<double>(load(p[1]))};
}
#endif

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

RK_HD double sum_of_lanes(const Doubles& v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

RK_NAMESPACE_END
