// Many Philox draws at once, for the CPU kernels of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/philox.h"
#include "stream.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

RK_NAMESPACE_BEGIN

// Of groups whose counters differ in the low word alone: what the first two rounds make of the
// others, and the keys of the eight rounds that are left.
struct PhiloxStart {
  uint32_t first, second0, second2, word3;
  uint32_t keys[kPhiloxRounds][2];

  RK_HD PhiloxStart(const RngStream& stream, uint32_t group_high) {
    uint32_t key0 = static_cast<uint32_t>(stream.key);
    uint32_t key1 = static_cast<uint32_t>(stream.key >> 32);
    for (auto& key : keys) {
      key[0] = key0;
      key[1] = key1;
      key0 += kPhiloxW0;
      key1 += kPhiloxW1;
    }
    const uint64_t p1 = (stream.offset & 0xffffffffu) * kPhiloxM1;
    const uint64_t p0 = ((p1 >> 32) ^ group_high ^ keys[0][0]) * kPhiloxM0;
    first = static_cast<uint32_t>(stream.offset >> 32) ^ keys[0][1];
    second0 = static_cast<uint32_t>(p1) ^ keys[1][0];
    second2 = static_cast<uint32_t>(p0 >> 32) ^ keys[1][1];
    word3 = static_cast<uint32_t>(p0);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)

// The draws of four counters side by side: words 0 and 2, which a round multiplies, in one vector,
// and words 3 and 1, which it xors to the products' high halves, in another one. The widening
// multiply reads every second word; a shift shows it the others. Of a product both halves are
// wanted, each beside that of the other product: one swap of a product's halves serves two blends.
// Two registers instead of four leave room for more draws at a time, which hide what a round waits
// for.
struct PhiloxLanes {
  static constexpr int kLanes = 4;
  using V = __m256i;
  static RK_HD V splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static RK_HD V both(uint32_t even, uint32_t odd) {
    return splat(even | static_cast<uint64_t>(odd) << 32);
  }
  static RK_HD V lane_order() { return _mm256_set_epi64x(3, 1, 2, 0); }
  static RK_HD V add(V a, V b) { return _mm256_add_epi64(a, b); }
  // Kept where it stands: g++ would begin so many multiplications that values go to memory.
  static RK_HD V in_order(V v) {
    asm volatile("" : "+x"(v));
    return v;
  }
  static RK_HD V multiply(V a, V b) { return in_order(_mm256_mul_epu32(a, b)); }
  static RK_HD V swapped(V a) { return _mm256_shuffle_epi32(a, 0xB1); }
  static RK_HD V alternating(V even, V odd) { return _mm256_blend_epi32(even, odd, 0xAA); }

  struct Constants {
    V m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1);
    V first, second, word3;
    V keys[kPhiloxRounds];

    RK_HD explicit Constants(const PhiloxStart& start)
        : first(splat(start.first)),
          second(both(start.second0, start.second2)),
          word3(splat(start.word3)) {
      for (int r = 0; r < kPhiloxRounds; ++r) {
        keys[r] = both(start.keys[r][1 - r % 2], start.keys[r][r % 2]);
      }
    }
  };

  V words02, words31;  // behind an odd number of rounds: words 2 and 0, 1 and 3

  // Rounds 0 and 1.
  RK_HD void begin(V groups, const Constants& of) {
    const V p0 = multiply(groups, of.m0);
    const V p1 = multiply(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), of.first), of.m1);
    words02 = _mm256_xor_si256(alternating(swapped(p1), _mm256_slli_epi64(p0, 32)), of.second);
    words31 = alternating(of.word3, swapped(p1));
  }

  template <int kRound>
  RK_HD void round(const Constants& of) {
    const V even = multiply(words02, kRound % 2 ? of.m1 : of.m0);
    const V odd = multiply(_mm256_srli_epi64(words02, 32), kRound % 2 ? of.m0 : of.m1);
    // What does not come from the multiplications first: the chain is shorter.
    const V others = in_order(_mm256_xor_si256(words31, of.keys[kRound]));
    words02 = in_order(_mm256_xor_si256(alternating(swapped(even), odd), others));
    words31 = alternating(odd, swapped(even));
  }

  RK_HD void store(char* out) const {
    const V words13 = swapped(words31);
    V* const to = reinterpret_cast<V*>(out);
    _mm256_store_si256(to, _mm256_unpacklo_epi32(words02, words13));
    _mm256_store_si256(to + 1, _mm256_unpackhi_epi32(words02, words13));
  }
};

// Draws at a time where they are stored, and where something else is computed meanwhile.
constexpr int kPhiloxChains = 6, kPhiloxChainsBeside = 3;

#elif defined(__SSE2__) || defined(__aarch64__)

#if defined(__AVX512F__)

// One lane of a 64-bit vector has one counter's word, valid in its low 32 bits: the widening
// multiply reads just those, so whatever a shift or a product leaves above them does no harm, and a
// round is two multiplies, two shifts and two xors. The four words are interleaved at the end by
// starting the lanes in the order that the unpack instructions undo.
struct PhiloxVectors {
  static constexpr int kLanes = 8;
  using V = __m512i;
  static RK_HD V splat(uint32_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static RK_HD V lane_order() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
  static RK_HD V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static RK_HD V multiply(V a, V b) { return _mm512_mul_epu32(a, b); }
  static RK_HD V low(V product) { return product; }
  static RK_HD V high(V product) { return _mm512_srli_epi64(product, 32); }
  static RK_HD V xor2(V a, V b) { return _mm512_xor_si512(a, b); }
  static RK_HD V xor3(V a, V b, V c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static RK_HD V side_by_side(V a, V b) {
    return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA);
  }
  static RK_HD void store(char* out, const V (&w)[4]) {
    const V w01 = side_by_side(w[0], w[1]), w23 = side_by_side(w[2], w[3]);
    _mm512_store_si512(out, _mm512_unpacklo_epi64(w01, w23));
    _mm512_store_si512(out + sizeof(V), _mm512_unpackhi_epi64(w01, w23));
  }
};
constexpr int kPhiloxChains = 4, kPhiloxChainsBeside = 3;

#elif defined(__SSE2__)

// As with AVX-512, two counters in a vector. A compiler that is left to itself has the words of
// four in one and spends half of the time on moving them.
struct PhiloxVectors {
  static constexpr int kLanes = 2;
  using V = __m128i;
  static RK_HD V splat(uint32_t x) { return _mm_set1_epi64x(static_cast<long long>(x)); }
  static RK_HD V lane_order() { return _mm_set_epi64x(1, 0); }
  static RK_HD V add(V a, V b) { return _mm_add_epi64(a, b); }
  static RK_HD V multiply(V a, V b) { return _mm_mul_epu32(a, b); }
  static RK_HD V low(V product) { return product; }
  static RK_HD V high(V product) { return _mm_srli_epi64(product, 32); }
  static RK_HD V xor2(V a, V b) { return _mm_xor_si128(a, b); }
  static RK_HD V xor3(V a, V b, V c) { return xor2(a, xor2(b, c)); }
  // Words i and i + 2 of either vector.
  template <int i>
  static RK_HD V every_second(V a, V b) {
    constexpr int kPicked = _MM_SHUFFLE(i + 2, i, i + 2, i);
    return _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(a), _mm_castsi128_ps(b), kPicked));
  }
  static RK_HD void store(char* out, const V (&w)[4]) {
    const V w01 = every_second<0>(w[0], w[1]), w23 = every_second<0>(w[2], w[3]);
    V* const to = reinterpret_cast<V*>(out);
    _mm_store_si128(to, every_second<0>(w01, w23));
    _mm_store_si128(to + 1, every_second<1>(w01, w23));
  }
};
constexpr int kPhiloxChains = 3;

#else

// A lane is a word: a widening multiply takes half of a vector's words, and what it makes of both
// halves is parted into low and high words. Stores that interleave four vectors do the rest.
struct PhiloxVectors {
  static constexpr int kLanes = 4;
  using V = uint32x4_t;
  static RK_HD V splat(uint32_t x) { return vdupq_n_u32(x); }
  static RK_HD V lane_order() { return V{0, 1, 2, 3}; }
  static RK_HD V add(V a, V b) { return vaddq_u32(a, b); }
  static RK_HD uint32x4x2_t multiply(V a, V b) {
    return {{vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b))),
             vreinterpretq_u32_u64(vmull_high_u32(a, b))}};
  }
  static RK_HD V low(uint32x4x2_t product) { return vuzp1q_u32(product.val[0], product.val[1]); }
  static RK_HD V high(uint32x4x2_t product) { return vuzp2q_u32(product.val[0], product.val[1]); }
  static RK_HD V xor2(V a, V b) { return veorq_u32(a, b); }
  static RK_HD V xor3(V a, V b, V c) { return veorq_u32(veorq_u32(a, b), c); }
  static RK_HD void store(char* out, const V (&w)[4]) {
    vst4q_u32(reinterpret_cast<uint32_t*>(out), {{w[0], w[1], w[2], w[3]}});
  }
};
constexpr int kPhiloxChains = 2;

#endif

// The draws of so many counters side by side, each word of them in a vector of its own.
struct PhiloxLanes : PhiloxVectors {
  struct Constants {
    V m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1);
    V first, second0, second2, word3;
    V keys[kPhiloxRounds][2];

    RK_HD explicit Constants(const PhiloxStart& start)
        : first(splat(start.first)),
          second0(splat(start.second0)),
          second2(splat(start.second2)),
          word3(splat(start.word3)) {
      for (int r = 0; r < kPhiloxRounds; ++r) {
        for (int i = 0; i < 2; ++i) keys[r][i] = splat(start.keys[r][i]);
      }
    }
  };

  V words[4];

  // Rounds 0 and 1.
  RK_HD void begin(V groups, const Constants& of) {
    const auto p0 = multiply(groups, of.m0), p1 = multiply(xor2(high(p0), of.first), of.m1);
    words[0] = xor2(high(p1), of.second0);
    words[1] = low(p1);
    words[2] = xor2(low(p0), of.second2);
    words[3] = of.word3;
  }

  template <int kRound>
  RK_HD void round(const Constants& of) {
    const auto p0 = multiply(words[0], of.m0), p1 = multiply(words[2], of.m1);
    words[0] = xor3(high(p1), words[1], of.keys[kRound][0]);
    words[2] = xor3(high(p0), words[3], of.keys[kRound][1]);
    words[1] = low(p1);
    words[3] = low(p0);
  }

  RK_HD void store(char* out) const { PhiloxVectors::store(out, words); }
};

#endif

constexpr int64_t kGroupBytes = sizeof(PhiloxWords);

// f<kFrom>() and so on.
template <int kFrom, int kTo, typename F>
RK_HD void for_each_number(const F& f) {
  if constexpr (kFrom < kTo) {
    f.template operator()<kFrom>();
    for_each_number<kFrom + 1, kTo>(f);
  }
}

#if defined(__SSE2__) || defined(__aarch64__)

constexpr int64_t kGroupBatch = kPhiloxChains * PhiloxLanes::kLanes;

// Draws groups [first, first + count), whose counters differ in the low word alone, so many chains
// of PhiloxLanes at a time, and hands them to taker.take(chain, drawn, groups since the first one).
// Meanwhile taker.step<0 to 8>(chain) does something else, a step behind each round: what the one
// waits for is time for the other.
template <int kChains, typename Taker>
RK_HD void draw_below_carry(const RngStream& stream, uint64_t first, int64_t count, Taker& taker) {
  using L = PhiloxLanes;
  const L::Constants constants(PhiloxStart(stream, static_cast<uint32_t>(first >> 32)));
  const L::V more = L::splat(L::kLanes);
  L::V groups = L::add(L::splat(static_cast<uint32_t>(first)), L::lane_order());
  for (int64_t group = 0; group < count; group += kChains * L::kLanes) {
    L drawn[kChains];
    for (int i = 0; i < kChains; ++i, groups = L::add(groups, more)) {
      drawn[i].begin(groups, constants);
      taker.template step<0>(i);
    }
    for_each_number<2, kPhiloxRounds>([&]<int kRound>() RK_INLINE {
      for (int i = 0; i < kChains; ++i) {
        drawn[i].template round<kRound>(constants);
        taker.template step<kRound - 1>(i);
      }
    });
    for (int i = 0; i < kChains; ++i) taker.take(i, drawn[i], group + i * L::kLanes);
  }
}

struct WordStorer {
  char* out;

  template <int kStep>
  RK_HD void step(int) {}
  RK_HD void take(int, const PhiloxLanes& drawn, int64_t group) {
    drawn.store(out + group * kGroupBytes);
  }
};

#else
constexpr int64_t kGroupBatch = 4;
#endif

// Whether the counters of groups [first, first + count) differ in the low word alone.
RK_HD bool below_carry(uint64_t first, int64_t count) {
  return (first >> 32) == ((first + count - 1) >> 32);
}

// Writes groups [first, first + count), whose half-words, and whose words, then lie in the order of
// the elements that they are for. `count` is a multiple of kGroupBatch, `out` is 64-byte aligned.
RK_HD void draw_groups(const RngStream& stream, uint64_t first, int64_t count, char* out) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's low half lies first");
  typedef uint32_t __attribute__((may_alias)) Word;
  constexpr int kGroupWords = kGroupBytes / sizeof(Word);
  Word* to = reinterpret_cast<Word*>(out);
#if defined(__SSE2__) || defined(__aarch64__)
  if (below_carry(first, count)) {
    WordStorer storer{out};
    return draw_below_carry<kPhiloxChains>(stream, first, count, storer);
  }
#endif
  for (int64_t group = 0; group < count; ++group) {
    const PhiloxWords words = stream(first + group);
    // Word by word, or the compiler makes no vector code of it.
    for (int i = 0; i < kGroupWords; ++i) to[group * kGroupWords + i] = words.w[i];
  }
}

// Elements that are drawn at once: whole batches, and whole lines of any type by four. Their draws
// are 1 to 3 KiB of the first-level cache.
constexpr int64_t kDrawTile = kGroupBatch % 3 == 0 ? 768 : 512;
static_assert(kDrawTile % (kGroupBatch * kGroup) == 0, "a tile is drawn in whole batches");

// A tile's draws, of 16 or 32 bits each; room for the group that a tile starts in the middle of.
template <typename Drawn>
struct DrawsOf {
  static constexpr int64_t kAGroup = kGroupBytes / sizeof(Drawn);
  alignas(64) Drawn drawn[kDrawTile + kGroupBatch * kAGroup];
  int64_t current = -1;  // what take() has drawn, in tiles

  // Draws `count` mask elements from index `first` on and returns the first one's draw. Inlined, so
  // that a loop over tiles spreads the key over its lanes once.
  RK_HD const Drawn* fill(const RngStream& stream, int64_t first, int64_t count) {
    const int64_t lead = first % kAGroup;
    const int64_t groups = ceil_div(lead + count, kGroupBatch * kAGroup) * kGroupBatch;
    draw_groups(stream, first / kAGroup, groups, reinterpret_cast<char*>(drawn));
    return drawn + lead;
  }

  // The draws of mask elements from `first` to the next multiple of kDrawTile. Those of a tile are
  // made once for all calls that take a part of it, one after the other.
  RK_HD const Drawn* take(const RngStream& stream, int64_t first) {
    constexpr int64_t kGroups = kDrawTile / kAGroup;
    if (first / kDrawTile != current) {
      current = first / kDrawTile;
      draw_groups(stream, current * kGroups, kGroups, reinterpret_cast<char*>(drawn));
    }
    return drawn + first % kDrawTile;
  }
};
using Draws = DrawsOf<uint16_t>;

RK_NAMESPACE_END
