// Normal numbers, a vector of pairs at a time: the steps of reg_kernels/normal.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "random.h"
#include "reg_kernels/normal.h"
#include "stream.h"

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
  static RK_HD Float all(float value) { return value - Float{}; }
  static RK_HD Float all(Float value) { return value; }

  // a b + c, rounded once. Without the instruction it is by way of double, where each of the sums
  // that normal.h makes of any word is exact or rounds to the same float.
  template <typename A, typename B, typename C>
  static RK_HD Float product_and_sum(A some, B others, C addends) {
    const Float a = all(some), b = all(others), c = all(addends);
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    Float result = _mm256_fmadd_ps(a, b, c);
    asm("" : "+x"(result));  // kept apart from others: g++ would have too many values at a time
    return result;
#elif defined(__x86_64__)
    const auto half = [](__m128 x, __m128 y, __m128 z) RK_INLINE {
      return _mm_cvtpd_ps(
          _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z)));
    };
    const auto upper = [](__m128 x) RK_INLINE { return _mm_movehl_ps(x, x); };
    return _mm_movelh_ps(half(a, b, c), half(upper(a), upper(b), upper(c)));
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    Float result;
    for (int i = 0; i < kLanes; ++i) result[i] = multiply_add(a[i], b[i], c[i]);
    return result;
#endif
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

// The numbers of so many words: 0 and 1 of a group from its words 0 and 3, the others from its
// words 2 and 1.
constexpr int64_t kWordsAtOnce = 2 * PairLanes::kLanes;
struct Normals {
  float of[kWordsAtOnce];
};

// Of the numbers of pairs of words 0 and 2, the groups in the order of RK_SHUFFLED.
RK_HD Normals in_order(const NormalPair<PairLanes>& pairs) {
  constexpr int kLanes = PairLanes::kLanes;
  const PairLanes::Float normals[] = {
      RK_SHUFFLED(pairs.first, pairs.second, 0, kLanes, 1, kLanes + 1),
      RK_SHUFFLED(pairs.first, pairs.second, 2, kLanes + 2, 3, kLanes + 3)};
  return bit_cast<Normals>(normals);
}

// Makes normal numbers of `count` words and of what is left of the last kWordsAtOnce, in place.
RK_HD void make_normals(uint32_t* words, int64_t count) {
  using L = PairLanes;
  constexpr int kLanes = L::kLanes;
  for (int64_t i = 0; i < count; i += kWordsAtOnce) {
    L::Word w[2];
    memcpy(w, words + i, sizeof(w));
    const Normals normals =
        in_order(normal_pair<L>(RK_SHUFFLED(w[0], w[1], 0, 2, kLanes, kLanes + 2),
                                RK_SHUFFLED(w[0], w[1], 3, 1, kLanes + 3, kLanes + 1)));
    memcpy(words + i, normals.of, sizeof(normals.of));
  }
}

#if defined(__AVX2__)

// Draws words and makes normal numbers of those before, a step of the one behind a round of the
// other: f(i, normals) gets the numbers from the one of number i on.
template <typename F>
class NormalsBehind {
 public:
  static constexpr int64_t kBatch = kPhiloxChainsBeside * kWordsAtOnce;

  RK_HD explicit NormalsBehind(const F& f) : f_(f) {}

  // `count` is a multiple of kBatch, and the counters differ in the low word alone.
  RK_HD void draw(const RngStream& stream, uint64_t first_group, int64_t count) {
    draw_below_carry<kPhiloxChainsBeside>(stream, first_group, count * 4 / kGroupBytes, *this);
    for (int i = 0; i < kPhiloxChainsBeside; ++i) {
      all_steps(pairs_[i]);
      hand_out(i);
    }
  }

  template <int kStep>
  RK_HD void step(int chain) {
    pairs_[chain].template step<kStep>();
    if constexpr (kStep == NormalPair<PairLanes>::kSteps - 1) {
      hand_out(chain);
    }
  }

  RK_HD void take(int chain, const PhiloxLanes& drawn, int64_t group) {
    const auto words = [](PhiloxLanes::V v)
                           RK_INLINE { return reinterpret_cast<PairLanes::Word>(v); };
#if defined(__AVX512F__)
    pairs_[chain].radius = words(drawn.side_by_side(drawn.words[0], drawn.words[2]));
    pairs_[chain].angle = words(drawn.side_by_side(drawn.words[3], drawn.words[1]));
#else
    pairs_[chain].radius = words(drawn.words02);
    pairs_[chain].angle = words(drawn.words31);
#endif
    batch_ = group * (kGroupBytes / 4) - chain * kWordsAtOnce;
  }

 private:
  RK_HD void hand_out(int chain) { f_(batch_ + chain * kWordsAtOnce, in_order(pairs_[chain])); }

  const F& f_;
  NormalPair<PairLanes> pairs_[kPhiloxChainsBeside]{};
  int64_t batch_ = 0;  // number of the first word whose normal number is being made
};

#endif

#undef RK_SHUFFLED
#undef RK_BY_FOURS

RK_NAMESPACE_END
