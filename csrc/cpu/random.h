// Many Philox draws at once, for the CPU kernels of one instruction set.
//
// On x86 one lane of a 64-bit vector holds one counter's word, valid in its low 32 bits: the
// widening multiply reads just those, so whatever a shift or a product leaves above them does no
// harm, and a round is two multiplies, two shifts and two xors. The four words are interleaved at
// the end by starting the lanes in the order that the unpack instructions undo.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

RK_NAMESPACE_BEGIN

#if defined(__AVX512F__)

struct PhiloxLanes {
  static constexpr int kLanes = 8;
  static constexpr int kChains = 4;  // independent draws at a time hide the multiply's latency
  using V = __m512i;
  static RK_HD V splat(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static RK_HD V lane_order() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
  static RK_HD V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static RK_HD V multiply(V a, V b) { return _mm512_mul_epu32(a, b); }
  static RK_HD V low(V product) { return product; }
  static RK_HD V high(V product) { return _mm512_srli_epi64(product, 32); }
  static RK_HD V xor3(V a, V b, V c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static RK_HD void store(char* out, V w0, V w1, V w2, V w3) {
    const V w01 = _mm512_mask_shuffle_epi32(w0, 0xAAAA, w1, _MM_PERM_CCAA);
    const V w23 = _mm512_mask_shuffle_epi32(w2, 0xAAAA, w3, _MM_PERM_CCAA);
    _mm512_store_si512(out, _mm512_unpacklo_epi64(w01, w23));
    _mm512_store_si512(out + sizeof(V), _mm512_unpackhi_epi64(w01, w23));
  }
};

#elif defined(__AVX2__)

struct PhiloxLanes {
  static constexpr int kLanes = 4;
  static constexpr int kChains = 3;  // more would not fit 16 registers
  using V = __m256i;
  static RK_HD V splat(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static RK_HD V lane_order() { return _mm256_set_epi64x(3, 1, 2, 0); }
  static RK_HD V add(V a, V b) { return _mm256_add_epi64(a, b); }
  // Kept where it stands: g++ would begin so many multiplications that values go to memory.
  static RK_HD V in_order(V v) {
    asm volatile("" : "+x"(v));
    return v;
  }
  static RK_HD V multiply(V a, V b) { return in_order(_mm256_mul_epu32(a, b)); }
  static RK_HD V low(V product) { return product; }
  static RK_HD V high(V product) { return _mm256_srli_epi64(product, 32); }
  // `a` comes last, from a multiplication, so b and c go first: left to itself g++ makes the chain
  // from one multiplication to the next longer, and that is what the loop waits for.
  static RK_HD V xor3(V a, V b, V c) {
    return in_order(_mm256_xor_si256(a, in_order(_mm256_xor_si256(b, c))));
  }
  static RK_HD void store(char* out, V w0, V w1, V w2, V w3) {
    const V w01 = _mm256_blend_epi32(w0, _mm256_shuffle_epi32(w1, 0xA0), 0xAA);
    const V w23 = _mm256_blend_epi32(w2, _mm256_shuffle_epi32(w3, 0xA0), 0xAA);
    _mm256_store_si256(reinterpret_cast<V*>(out), _mm256_unpacklo_epi64(w01, w23));
    _mm256_store_si256(reinterpret_cast<V*>(out + sizeof(V)), _mm256_unpackhi_epi64(w01, w23));
  }
};

#elif defined(__aarch64__)

// A lane is a word: a widening multiply takes half of a vector's words, and what it makes of both
// halves is parted into low and high words. Stores that interleave four vectors do the rest.
struct PhiloxLanes {
  static constexpr int kLanes = 4;
  static constexpr int kChains = 2;
  using V = uint32x4_t;
  static RK_HD V splat(uint64_t x) { return vdupq_n_u32(static_cast<uint32_t>(x)); }
  static RK_HD V lane_order() { return V{0, 1, 2, 3}; }
  static RK_HD V add(V a, V b) { return vaddq_u32(a, b); }
  static RK_HD uint32x4x2_t multiply(V a, V b) {
    return {{vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b))),
             vreinterpretq_u32_u64(vmull_high_u32(a, b))}};
  }
  static RK_HD V low(uint32x4x2_t product) { return vuzp1q_u32(product.val[0], product.val[1]); }
  static RK_HD V high(uint32x4x2_t product) { return vuzp2q_u32(product.val[0], product.val[1]); }
  static RK_HD V xor3(V a, V b, V c) { return veorq_u32(veorq_u32(a, b), c); }
  static RK_HD void store(char* out, V w0, V w1, V w2, V w3) {
    vst4q_u32(reinterpret_cast<uint32_t*>(out), {{w0, w1, w2, w3}});
  }
};

#endif

constexpr int64_t kGroupBytes = sizeof(PhiloxWords);

// What follows a draw, a step behind it: called as behind(words, bytes) for all of them in order.
struct NothingBehind {
  RK_HD void operator()(char*, int64_t) const {}
};

#if defined(__AVX2__) || defined(__aarch64__)

constexpr int64_t kGroupBatch = PhiloxLanes::kChains * PhiloxLanes::kLanes;

// `draw_groups` for groups whose counters differ in the low word alone. The high word then does
// not change in the loop, nor does what the first two rounds make of it and of the offset, and the
// compiler takes a tenth of the work out of the loop.
template <typename Behind>
RK_HD void draw_below_carry(const RngStream& stream, uint64_t first, int64_t count, char* out,
                            const Behind& behind) {
  using L = PhiloxLanes;
  using V = L::V;
  constexpr int kChains = L::kChains;
  const V m0 = L::splat(kPhiloxM0), m1 = L::splat(kPhiloxM1);
  const V group_high = L::splat(first >> 32);
  const V offset_low = L::splat(stream.offset), offset_high = L::splat(stream.offset >> 32);
  V k0[kPhiloxRounds], k1[kPhiloxRounds];
  uint32_t key0 = static_cast<uint32_t>(stream.key), key1 = static_cast<uint32_t>(stream.key >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    k0[r] = L::splat(key0);
    k1[r] = L::splat(key1);
  }
  for (int64_t group = 0; group < count; group += kGroupBatch) {
    V c[kChains][4];
    for (int i = 0; i < kChains; ++i) {
      c[i][0] = L::add(L::splat(first + group + i * L::kLanes), L::lane_order());
      c[i][1] = group_high;
      c[i][2] = offset_low;
      c[i][3] = offset_high;
    }
#pragma GCC unroll 10
    for (int r = 0; r < kPhiloxRounds; ++r) {
      for (int i = 0; i < kChains; ++i) {
        const auto p0 = L::multiply(c[i][0], m0), p1 = L::multiply(c[i][2], m1);
        c[i][0] = L::xor3(L::high(p1), c[i][1], k0[r]);
        c[i][2] = L::xor3(L::high(p0), c[i][3], k1[r]);
        c[i][1] = L::low(p1);
        c[i][3] = L::low(p0);
      }
    }
    for (int i = 0; i < kChains; ++i) {
      L::store(out + (group + i * L::kLanes) * kGroupBytes, c[i][0], c[i][1], c[i][2], c[i][3]);
    }
    if (group > 0) behind(out + (group - kGroupBatch) * kGroupBytes, kGroupBatch * kGroupBytes);
  }
  behind(out + (count - kGroupBatch) * kGroupBytes, kGroupBatch * kGroupBytes);
}

#endif

#if !defined(__AVX2__) && !defined(__aarch64__)
constexpr int64_t kGroupBatch = 4;
#endif

// Writes groups [first, first + count), whose half-words, and whose words, then lie in the order of
// the elements that they are for. `count` is a multiple of kGroupBatch, `out` is 64-byte aligned.
template <typename Behind>
RK_HD void draw_groups(const RngStream& stream, uint64_t first, int64_t count, char* out,
                       const Behind& behind) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's low half lies first");
  typedef uint32_t __attribute__((may_alias)) Word;
  constexpr int kGroupWords = kGroupBytes / sizeof(Word);
  Word* to = reinterpret_cast<Word*>(out);
  int64_t group = 0;
#if defined(__AVX2__) || defined(__aarch64__)
  if ((first >> 32) == ((first + count - 1) >> 32)) {
    return draw_below_carry(stream, first, count, out, behind);
  }
#endif
  for (; group < count; ++group) {
    const PhiloxWords words = stream(first + group);
    // Word by word, or the compiler makes no vector code of it.
    for (int i = 0; i < kGroupWords; ++i) to[group * kGroupWords + i] = words.w[i];
  }
  behind(out, count * kGroupBytes);
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
  template <typename Behind = NothingBehind>
  RK_HD const Drawn* fill(const RngStream& stream, int64_t first, int64_t count,
                          const Behind& behind = {}) {
    const int64_t lead = first % kAGroup;
    const int64_t groups = ceil_div(lead + count, kGroupBatch * kAGroup) * kGroupBatch;
    draw_groups(stream, first / kAGroup, groups, reinterpret_cast<char*>(drawn), behind);
    return drawn + lead;
  }

  // The draws of mask elements from `first` to the next multiple of kDrawTile. Those of a tile are
  // made once for all calls that take a part of it, one after the other.
  RK_HD const Drawn* take(const RngStream& stream, int64_t first) {
    constexpr int64_t kGroups = kDrawTile / kAGroup;
    if (first / kDrawTile != current) {
      current = first / kDrawTile;
      draw_groups(stream, current * kGroups, kGroups, reinterpret_cast<char*>(drawn),
                  NothingBehind{});
    }
    return drawn + first % kDrawTile;
  }
};
using Draws = DrawsOf<uint16_t>;

RK_NAMESPACE_END
