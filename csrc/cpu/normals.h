// Normal numbers, a vector of pairs at a time: the steps of reg_kernels/normal.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/normal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

RK_NAMESPACE_BEGIN

struct PairLanes {
#if defined(__AVX512F__)
  static constexpr int kLanes = 16;
#elif defined(__AVX2__)
  static constexpr int kLanes = 8;
#else
  static constexpr int kLanes = 4;
#endif
  typedef float Float __attribute__((vector_size(kLanes * sizeof(float))));
  typedef uint32_t Word __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Integer __attribute__((vector_size(kLanes * sizeof(float))));

  static RK_HD Float as_float(Word bits) { return reinterpret_cast<Float>(bits); }
  static RK_HD Word as_bits(Float value) { return reinterpret_cast<Word>(value); }
  static RK_HD Float of_integer(Word word) {
    return __builtin_convertvector(reinterpret_cast<Integer>(word), Float);
  }
  static RK_HD Float sum(Float a, Float b) { return a + b; }
  static RK_HD Float sum(Float a, float b) { return a + b; }
  static RK_HD Float either(Word word, Float if_odd, Float if_even) {
    return reinterpret_cast<Integer>(word << 31) < 0 ? if_odd : if_even;
  }
  static RK_HD Float root(Float x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
    return _mm_sqrt_ps(x);
#elif defined(__aarch64__)
    return vsqrtq_f32(x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = ::sqrtf(x[i]);
    return x;
#endif
  }
};

// The words of two vectors, which lie in pairs, as vectors of each pair's first and second words;
// and back again. All within 16 bytes, where a shuffle costs least.
#if defined(__AVX512F__)
#define RK_BY_FOURS(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#elif defined(__AVX2__)
#define RK_BY_FOURS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define RK_BY_FOURS(a, b, c, d) a, b, c, d
#endif
#define RK_SHUFFLED(x, y, a, b, c, d) __builtin_shufflevector(x, y, RK_BY_FOURS(a, b, c, d))

// Makes normal numbers of so many words, in place.
constexpr int64_t kWordsAtOnce = 2 * PairLanes::kLanes;
RK_HD void make_normals(char* words) {
  using L = PairLanes;
  constexpr int kLanes = L::kLanes;
  L::Word w[2];
  memcpy(w, words, sizeof(w));
  const auto pairs = normal_pair<L>(RK_SHUFFLED(w[0], w[1], 0, 2, kLanes, kLanes + 2),
                                    RK_SHUFFLED(w[0], w[1], 1, 3, kLanes + 1, kLanes + 3));
  const L::Float normals[] = {RK_SHUFFLED(pairs.first, pairs.second, 0, kLanes, 1, kLanes + 1),
                              RK_SHUFFLED(pairs.first, pairs.second, 2, kLanes + 2, 3, kLanes + 3)};
  memcpy(words, normals, sizeof(normals));
}

#undef RK_SHUFFLED
#undef RK_BY_FOURS

RK_NAMESPACE_END
