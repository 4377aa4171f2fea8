// The elements of a tile, one by one or, where they are each multiplied by 0 or a scale and there
// is a shorter way with the same bits, several at once: four cache lines with AVX-512, eight
// float16 with AVX2 or NEON.
#pragma once

#include "lanes.h"
#include "reg_kernels/elementwise.h"
#include "stream.h"

RK_NAMESPACE_BEGIN

// What the shorter ways know of a scale before the first element, where an op has any use for it.
template <typename T, bool kMultiplies>
struct LineScale {
  template <typename Factor>
  explicit LineScale(const Factor&) {}
};

// What an element's op gets of its draw.
template <typename Op>
RK_HD typename Op::Draw draw_of(drawn_t<Op> drawn, uint16_t last_kept, bool any_kept = true) {
  if constexpr (kKeepsOrDrops<Op>) {
    return drawn <= last_kept && any_kept;
  } else if constexpr (kDrawsNormals<Op>) {
    return {bit_cast<float>(drawn)};
  } else {
    return drawn;
  }
}

// Element i of a tile: x[i] with what was drawn for it.
template <typename Op, typename T>
struct Tile {
  const T* x;
  const drawn_t<Op>* drawn;
  uint16_t last_kept;
  factor_t<Op, T> factor;
  const LineScale<T, kMultiplies<Op>>* lines;

  RK_HD typename Op::Draw draw(int64_t i) const { return draw_of<Op>(drawn[i], last_kept); }
  RK_HD T operator()(int64_t i) const { return element_of<Op>(x[i], draw(i), factor); }
};

// The same with a residual.
template <typename Op, typename T>
struct TileBeside {
  Tile<Op, T> tile;
  const T* residual;

  RK_HD T operator()(int64_t i) const {
    return element_of<Op>(tile.x[i], tile.draw(i), tile.factor, residual[i]);
  }
};

#if defined(__AVX512BW__)

constexpr int kWords = 32;       // 16-bit elements of a register, which is a cache line
constexpr int kLinesAtOnce = 4;  // as write_each has them

RK_HD __m512i words_at(const void* p) { return _mm512_loadu_si512(p); }
RK_HD __m512i all_words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// A product's mantissa depends on the seven bits of x's mantissa alone, and its exponent is x's
// plus what those say: y = x + change[mantissa], as bits. That holds for normal numbers whose
// product is one too; zeros stay as they are, and whatever else there is takes the plain way.
template <>
struct LineScale<bfloat16, true> {
  __m512i change[4];
  __m512i largest;  // 2 |x|, as bits, that has a finite product

  explicit LineScale(float scale) {
    constexpr int kOne = 0x3f80, kMantissas = 128;
    uint16_t words[kMantissas];
#pragma omp simd
    for (int m = 0; m < kMantissas; ++m) {
      const bfloat16 x{static_cast<uint16_t>(kOne + m)};
      words[m] = static_cast<uint16_t>(store_product<bfloat16>(load(x) * scale).bits - x.bits);
    }
    for (int i = 0; i < 4; ++i) change[i] = words_at(words + i * kWords);
    // The largest mantissa adds the most. A scale of 0 leaves nothing normal, 1 or more does.
    const int most = ((words[kMantissas - 1] + kOne + kMantissas - 1) >> 7) - (kOne >> 7);
    largest = all_words(scale >= 1.0f ? ((255 - most) << 8) - 1 : 0);
  }
};

// Whether elements [i, i + 4 * kWords) have gone to y the shorter way; if not, y is as it was. It
// may be where they lie in x.
template <typename Op>
  requires kMultiplies<Op>
RK_HD bool write_lines(const Tile<Op, bfloat16>& tile, int64_t i, bfloat16* y) {
  const LineScale<bfloat16, true>& lines = *tile.lines;
  const __m512i last = all_words(tile.last_kept);
  __m512i products[kLinesAtOnce];
  // 2 |x|, as bits, at the most, and less one at the least, which makes a zero the greatest.
  __m512i most = all_words(0), least = all_words(0xffff);
  for (int j = 0; j < kLinesAtOnce; ++j) {
    const __m512i x = words_at(tile.x + i + j * kWords);
    const __m512i twice = _mm512_add_epi16(x, x);
    most = _mm512_max_epu16(most, twice);
    least = _mm512_min_epu16(least, _mm512_sub_epi16(twice, all_words(1)));
    const __mmask32 nonzero = _mm512_test_epi16_mask(x, all_words(0x7fff));
    const __m512i change =
        _mm512_mask_blend_epi16(_mm512_test_epi16_mask(x, all_words(0x40)),
                                _mm512_permutex2var_epi16(lines.change[0], x, lines.change[1]),
                                _mm512_permutex2var_epi16(lines.change[2], x, lines.change[3]));
    const __m512i drawn = words_at(tile.drawn + i + j * kWords);
    products[j] =
        _mm512_mask_add_epi16(_mm512_and_si512(x, all_words(0x8000)),
                              _mm512_mask_cmple_epu16_mask(nonzero, drawn, last), x, change);
  }
  const __mmask32 other = _mm512_cmpgt_epu16_mask(most, lines.largest) |
                          _mm512_cmplt_epu16_mask(least, all_words(0xff));
  if (other) return false;
  for (int j = 0; j < kLinesAtOnce; ++j) _mm512_storeu_si512(y + j * kWords, products[j]);
  return true;
}

// The processor's own conversions, which differ in what they make of a NaN: Inf and NaN take the
// plain way.
template <typename Op>
  requires kMultiplies<Op>
RK_HD bool write_lines(const Tile<Op, float16>& tile, int64_t i, float16* y) {
  const __m512i last = all_words(tile.last_kept);
  const __m512 scale = _mm512_set1_ps(tile.factor);
  __m512i products[kLinesAtOnce];
  __m512i most = all_words(0);  // 2 |x|, as bits
  for (int j = 0; j < kLinesAtOnce; ++j) {
    const __m512i x = words_at(tile.x + i + j * kWords);
    most = _mm512_max_epu16(most, _mm512_add_epi16(x, x));
    const __m512i drawn = words_at(tile.drawn + i + j * kWords);
    const __mmask32 kept = _mm512_cmple_epu16_mask(drawn, last);
    const auto half = [&](__m256i words, __mmask16 keep) __attribute__((always_inline)) {
      const __m512 multiplier = _mm512_maskz_mov_ps(keep, scale);
      return _mm512_cvtps_ph(_mm512_mul_ps(_mm512_cvtph_ps(words), multiplier),
                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    };
    const __m256i low = half(_mm512_castsi512_si256(x), static_cast<__mmask16>(kept));
    const __m256i high = half(_mm512_extracti64x4_epi64(x, 1), static_cast<__mmask16>(kept >> 16));
    products[j] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  if (_mm512_cmpge_epu16_mask(most, all_words(0xf800))) return false;
  for (int j = 0; j < kLinesAtOnce; ++j) _mm512_storeu_si512(y + j * kWords, products[j]);
  return true;
}

#elif defined(__AVX2__)

// Whether elements [i, i + 128) have gone to y the shorter way, as above. The products of a
// register's even words and of its odd ones are floats whose high halves are the result; both are
// rounded at once, by the carry out of their low halves. Inf and NaN take the plain way.
template <typename Op>
  requires kMultiplies<Op>
RK_HD bool write_lines(const Tile<Op, bfloat16>& tile, int64_t i, bfloat16* y) {
  constexpr int kWords = 16, kAtOnce = 8;  // four cache lines, as write_each has them
  const auto words_at = [](const void* p) RK_INLINE {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  };
  const auto all_words = [](int value)
                             RK_INLINE { return _mm256_set1_epi16(static_cast<short>(value)); };
  __m256i most = all_words(0);  // 2 |x|, as bits
  for (int j = 0; j < kAtOnce; ++j) {
    const __m256i x = words_at(tile.x + i + j * kWords);
    most = _mm256_max_epu16(most, _mm256_add_epi16(x, x));
  }
  const __m256i infinite = _mm256_cmpeq_epi16(_mm256_max_epu16(most, all_words(0xff00)), most);
  if (!_mm256_testz_si256(infinite, infinite)) return false;
  const __m256i last = all_words(tile.last_kept);
  const __m256 scale = _mm256_set1_ps(tile.factor);
  const auto scaled = [=](__m256i x) RK_INLINE {
    return _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(x), scale));
  };
  for (int j = 0; j < kAtOnce; ++j) {
    const __m256i x = words_at(tile.x + i + j * kWords);
    const __m256i drawn = words_at(tile.drawn + i + j * kWords);
    const __m256i even = scaled(_mm256_slli_epi32(x, 16));
    const __m256i odd = scaled(_mm256_blend_epi16(x, _mm256_setzero_si256(), 0x55));
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
    const __m256i low = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    // low + 0x7fff + (high & 1) has a carry where half of it, rounded up, has its top bit.
    const __m256i half =
        _mm256_and_si256(_mm256_or_si256(high, all_words(0x7ffe)), all_words(0x7fff));
    const __m256i carry = _mm256_srli_epi16(_mm256_avg_epu16(low, half), 15);
    const __m256i kept = _mm256_cmpeq_epi16(_mm256_min_epu16(drawn, last), drawn);
    const __m256i product = _mm256_blendv_epi8(_mm256_and_si256(x, all_words(0x8000)),
                                               _mm256_add_epi16(high, carry), kept);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + j * kWords), product);
  }
  return true;
}

// By the instructions that convert, which the compiler does not find in dtypes.h's arithmetic.
template <typename Op>
  requires kMultiplies<Op>
RK_HD void write_eight(const Tile<Op, float16>& tile, int64_t i, float16* y) {
  const __m128i drawn = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.drawn + i));
  const __m128i last = _mm_set1_epi16(static_cast<short>(tile.last_kept));
  const __m128i kept = _mm_cmpeq_epi16(_mm_min_epu16(drawn, last), drawn);
  const __m256 mask = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(kept));
  const __m256 multiplier = _mm256_and_ps(_mm256_set1_ps(tile.factor), mask);
  store_floats(y, _mm256_mul_ps(load_floats(tile.x + i), multiplier));
}

#elif defined(__aarch64__)

// As with AVX2.
template <typename Op>
  requires kMultiplies<Op>
RK_HD void write_eight(const Tile<Op, float16>& tile, int64_t i, float16* y) {
  const Floats x = load_floats(tile.x + i);
  const uint16x8_t drawn = vld1q_u16(tile.drawn + i);
  const int16x8_t kept = vreinterpretq_s16_u16(vcleq_u16(drawn, vdupq_n_u16(tile.last_kept)));
  const int32x4_t scale = vreinterpretq_s32_f32(vdupq_n_f32(tile.factor));
  const auto multiplier = [&](int32x4_t mask)
                              RK_INLINE { return vreinterpretq_f32_s32(vandq_s32(scale, mask)); };
  store_floats(y, {vmulq_f32(x.low, multiplier(vmovl_s16(vget_low_s16(kept)))),
                   vmulq_f32(x.high, multiplier(vmovl_high_s16(kept)))});
}

#endif

RK_NAMESPACE_END
