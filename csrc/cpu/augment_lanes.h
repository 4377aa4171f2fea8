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

#if defined(__x86_64__)
RK_HD Integers joined(const __m128 (&parts)[kVector / 4]) {
#if defined(__AVX2__)
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(parts[0]), parts[1], 1);
#if defined(__AVX512F__)
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(parts[2]), parts[3], 1);
  return reinterpret_cast<Integers>(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
#else
  return reinterpret_cast<Integers>(low);
#endif
#else
  return reinterpret_cast<Integers>(parts[0]);
#endif
}
#endif

// Each lane's number, in memory: taken out of a register one by one, they cost more than they do
// there.
struct LaneNumbers {
  int32_t at[kVector];
  explicit RK_HD LaneNumbers(Integers v) {
    memcpy(at, &v, sizeof(at));
    asm("" : "+m"(at));
  }
};

// load(k) for each lane k, by loads of single elements. By the instructions that gather a bilinear
// warp took longer (2026-11-29, EPYC, two runs of a busy machine: 8.7 ns a pixel, and 3.0 so).
template <typename V, typename Load>
RK_HD V of_lanes(const Load& load) {
#if defined(__x86_64__)
  const auto bits = [&](int i) RK_INLINE { return bit_cast<int32_t>(load(i)); };
  __m128 parts[kVector / 4];
  for (int k = 0; k < kVector; k += 4) {
    parts[k / 4] = _mm_castsi128_ps(_mm_setr_epi32(bits(k), bits(k + 1), bits(k + 2), bits(k + 3)));
  }
  return reinterpret_cast<V>(joined(parts));
#else
  V v;
  for (int i = 0; i < kVector; ++i) v[i] = load(i);
  return v;
#endif
}

// The same of 64 bits each, parted into their halves.
struct LanePairs {
  Integers first, second;
};
template <typename Load>
RK_HD LanePairs pairs_of_lanes(const Load& load) {
#if defined(__x86_64__)
  // Two lanes of them, then four lanes' first and second halves.
  const auto two = [&](int k) RK_INLINE {
    const auto one = [&](int j)
                         RK_INLINE { return _mm_cvtsi64_si128(static_cast<long long>(load(j))); };
    return _mm_castsi128_ps(_mm_unpacklo_epi64(one(k), one(k + 1)));
  };
  __m128 firsts[kVector / 4], seconds[kVector / 4];
  for (int k = 0; k < kVector / 4; ++k) {
    const __m128 low = two(4 * k), high = two(4 * k + 2);
    firsts[k] = _mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0));
    seconds[k] = _mm_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1));
  }
  return {joined(firsts), joined(seconds)};
#else
  LanePairs pairs;
  for (int i = 0; i < kVector; ++i) {
    const uint64_t both = load(i);
    pairs.first[i] = static_cast<int32_t>(both);
    pairs.second[i] = static_cast<int32_t>(both >> 32);
  }
  return pairs;
#endif
}

// Eight bytes at each lane's offset, in units of `unit` bytes.
RK_HD LanePairs gathered_pairs(const void* p, Integers index, int64_t unit) {
  const LaneNumbers lanes(index);
  return pairs_of_lanes([&](int i) RK_INLINE {
    uint64_t both;
    memcpy(&both, static_cast<const char*>(p) + lanes.at[i] * unit, sizeof(both));
    return both;
  });
}

// p[index] for each lane.
RK_HD Vector gathered(const float* p, Integers index) {
  const LaneNumbers lanes(index);
  return of_lanes<Vector>([&](int i) RK_INLINE { return p[lanes.at[i]]; });
}

// The four bytes at each lane's offset.
RK_HD Integers gathered_words(const uint8_t* p, Integers offset) {
  const LaneNumbers lanes(offset);
  return of_lanes<Integers>([&](int i) RK_INLINE {
    int32_t word;
    memcpy(&word, p + lanes.at[i], sizeof(word));
    return word;
  });
}

// p[index] for indices in [0, kPicked), by shuffles where there are such.
constexpr int kPicked = 2 * kVector;
struct Picker {
  Picker() = default;
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

// p[index] for indices in [0, kVector).
RK_HD Vector picked(const float* p, Integers index) {
#if defined(__AVX512F__)
  return _mm512_maskz_permutexvar_ps(static_cast<__mmask16>(-1), reinterpret_cast<__m512i>(index),
                                     vector_at(p));
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(vector_at(p), reinterpret_cast<__m256i>(index));
#else
  return gathered(p, index);
#endif
}

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
#elif defined(__x86_64__)
  int32_t four;
  memcpy(&four, p, sizeof(four));
  const __m128i halves = _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), __m128i{});
  return _mm_cvtepi32_ps(_mm_unpacklo_epi16(halves, __m128i{}));
#else
  Vector v;
  for (int i = 0; i < kVector; ++i) v[i] = p[i];
  return v;
#endif
}

// kVector whole numbers in [0, 255] as bytes.
RK_HD void put_bytes(uint8_t* p, Integers v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#elif defined(__x86_64__)
#if defined(__AVX2__)
  const __m256i words = reinterpret_cast<__m256i>(v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  const __m128i halves = _mm_packs_epi32(reinterpret_cast<__m128i>(v), __m128i{});
#endif
  const __m128i bytes = _mm_packus_epi16(halves, halves);
  memcpy(p, &bytes, kVector);
#else
  for (int i = 0; i < kVector; ++i) p[i] = static_cast<uint8_t>(v[i]);
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
