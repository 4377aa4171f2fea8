// Vectors of floats as augment's loops take them, a register each: rows have room for whole ones,
// so that no loop has a tail. augment_math.h computes with them as with a float.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "reg_kernels/augment_math.h"
#include "stream.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

RK_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kVector = 16;
#elif defined(__AVX2__)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif
typedef float Vector __attribute__((vector_size(kVector * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kVector * sizeof(int32_t))));

template <>
struct WholeNumbers<Vector> {
#if defined(__AVX512F__)
  template <int kMode>
  static RK_HD Vector round(Vector x) {
    return _mm512_maskz_roundscale_ps(static_cast<__mmask16>(-1), x, kMode);
  }
#elif defined(__AVX2__)
  template <int kMode>
  static RK_HD Vector round(Vector x) {
    return _mm256_round_ps(x, kMode);
  }
#endif
#if defined(__AVX2__)
  static RK_HD Vector nearest(Vector x) {
    return round<_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC>(x);
  }
  static RK_HD Vector below(Vector x) {
    return round<_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC>(x);
  }
#elif defined(__aarch64__)
  static RK_HD Vector nearest(Vector x) { return vrndnq_f32(x); }
  static RK_HD Vector below(Vector x) { return vrndmq_f32(x); }
#else
  // Beside 2^23 no bits are left for a fraction.
  static RK_HD Vector nearest(Vector x) {
    const Integers sign = reinterpret_cast<Integers>(x) & INT32_MIN;
    Vector size = reinterpret_cast<Vector>(reinterpret_cast<Integers>(x) ^ sign);
    size = size < 0x1p23f ? (size + 0x1p23f) - 0x1p23f : size;
    return reinterpret_cast<Vector>(reinterpret_cast<Integers>(size) | sign);
  }
  static RK_HD Vector below(Vector x) {
    const Vector whole = nearest(x);
    return whole > x ? whole - 1.0f : whole;
  }
#endif
  static RK_HD Vector product_sum(float a, Vector b, Vector c) {
    typedef double Doubles __attribute__((vector_size(kVector * sizeof(double))));
    const Doubles product = static_cast<double>(a) * __builtin_convertvector(b, Doubles);
    return __builtin_convertvector(product + __builtin_convertvector(c, Doubles), Vector);
  }
};

RK_HD Vector vector_at(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof(v));
  return v;
}
RK_HD Integers integers_at(const int32_t* p) {
  Integers v;
  memcpy(&v, p, sizeof(v));
  return v;
}
RK_HD void put(float* p, Vector v) { memcpy(p, &v, sizeof(v)); }

// All lanes the same number; 0, 1, 2, ...
RK_HD Vector all(float x) { return x - Vector{}; }
RK_HD Integers lane_numbers() {
  constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return integers_at(kNumbers);
}

// Whole numbers to and fro; as integers they must fit.
RK_HD Vector as_floats(Integers v) { return __builtin_convertvector(v, Vector); }
RK_HD Integers as_integers(Vector v) { return __builtin_convertvector(v, Integers); }

RK_HD Integers clamped(Integers v, int least, int most) {
  v = v < least ? least : v;
  return v > most ? most : v;
}

// Of a comparison's result.
RK_HD bool in_any_lane(Integers mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0;
#elif defined(__aarch64__)
  return vminvq_s32(mask) < 0;
#else
  for (int i = 0; i < kVector; ++i) {
    if (mask[i]) return true;
  }
  return false;
#endif
}
RK_HD bool in_all_lanes(Integers mask) { return !in_any_lane(~mask); }

// p[index] for each lane.
RK_HD Vector gathered(const float* p, Integers index) {
#if defined(__AVX512F__)
  return _mm512_mask_i32gather_ps(Vector{}, static_cast<__mmask16>(-1),
                                  reinterpret_cast<__m512i>(index), p, 4);
#elif defined(__AVX2__)
  const Vector every = reinterpret_cast<Vector>(~Integers{});
  return _mm256_mask_i32gather_ps(Vector{}, p, reinterpret_cast<__m256i>(index), every, 4);
#else
  Vector v;
  for (int i = 0; i < kVector; ++i) v[i] = p[index[i]];
  return v;
#endif
}

// The four bytes at each lane's offset.
RK_HD Integers gathered_words(const uint8_t* p, Integers offset) {
#if defined(__AVX512F__)
  return reinterpret_cast<Integers>(_mm512_mask_i32gather_epi32(
      __m512i{}, static_cast<__mmask16>(-1), reinterpret_cast<__m512i>(offset), p, 1));
#elif defined(__AVX2__)
  return reinterpret_cast<Integers>(_mm256_mask_i32gather_epi32(
      __m256i{}, reinterpret_cast<const int*>(p), reinterpret_cast<__m256i>(offset),
      reinterpret_cast<__m256i>(~Integers{}), 1));
#else
  Integers v;
  for (int i = 0; i < kVector; ++i) {
    int32_t word;
    memcpy(&word, p + offset[i], sizeof(word));
    v[i] = word;
  }
  return v;
#endif
}

// p[index] for indices in [0, kPicked), by shuffles where there are such.
constexpr int kPicked = 2 * kVector;
struct Picker {
#if defined(__AVX2__)
  Vector low, high;
  explicit RK_HD Picker(const float* p) : low(vector_at(p)), high(vector_at(p + kVector)) {}
#else
  const float* p;
  explicit RK_HD Picker(const float* p) : p(p) {}
#endif

  RK_HD Vector operator()(Integers index) const {
#if defined(__AVX512F__)
    return _mm512_permutex2var_ps(low, reinterpret_cast<__m512i>(index), high);
#elif defined(__AVX2__)
    const __m256i i = reinterpret_cast<__m256i>(index);
    const __m256 upper = reinterpret_cast<__m256>(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                            upper);
#else
    return gathered(p, index);
#endif
  }
};

// The floats of kVector bytes.
RK_HD Vector bytes_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(
      static_cast<__mmask16>(-1),
      _mm512_maskz_cvtepu8_epi32(static_cast<__mmask16>(-1),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vector v;
  for (int i = 0; i < kVector; ++i) v[i] = p[i];
  return v;
#endif
}

RK_HD int64_t whole_vectors(int64_t count) { return ceil_div(count, int64_t{kVector}) * kVector; }

// Memory at a multiple of a cache line, which grows and is filled with zeros when it does.
template <typename T>
class Room {
 public:
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { release(); }

  T* at_least(int64_t count) {
    if (count > count_) {
      release();
      const auto bytes = static_cast<size_t>(count) * sizeof(T);
      data_ = static_cast<T*>(operator new[](bytes, std::align_val_t{kLine}));
      memset(data_, 0, bytes);
      count_ = count;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) operator delete[](data_, std::align_val_t{kLine});
    data_ = nullptr;
  }

  T* data_ = nullptr;
  int64_t count_ = 0;
};

RK_NAMESPACE_END
