// One bit an element: eight flags, bytes of 0 or 1, to and from a byte.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/portable.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

RK_NAMESPACE_BEGIN

// Packs `count` flags, bit 0 first, into whole bytes; what is left of the last one becomes 0.
RK_HD void pack_bits(const uint8_t* flags, int64_t count, uint8_t* bits) {
  const int64_t whole = count / 8;
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 4 <= whole; i += 4) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags + 8 * i));
    const int packed = _mm256_movemask_epi8(_mm256_slli_epi16(v, 7));
    memcpy(bits + i, &packed, sizeof(packed));
  }
#endif
  for (; i < whole; ++i) {
    uint64_t eight;
    memcpy(&eight, flags + 8 * i, sizeof(eight));
    // The product moves flag j, at bit 8 j, to bit 56 + j; no two terms meet on the way.
    bits[i] = static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
  }
  if (count % 8) {
    uint8_t last = 0;
    for (int64_t j = 0; j < count % 8; ++j) {
      last = static_cast<uint8_t>(last | flags[8 * whole + j] << j);
    }
    bits[whole] = last;
  }
}

// The flags of `count` bits; writes up to seven more behind them.
RK_HD void unpack_bits(const uint8_t* bits, int64_t count, uint8_t* flags) {
  const int64_t bytes = ceil_div(count, 8);
  int64_t i = 0;
#if defined(__AVX2__)
  const __m256i places = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                           0x0101010101010101, 0x0000000000000000);
  const __m256i kept = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  for (; i + 4 <= bytes; i += 4) {
    int packed;
    memcpy(&packed, bits + i, sizeof(packed));
    const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(packed), places);
    const __m256i v = _mm256_min_epu8(_mm256_and_si256(copies, kept), _mm256_set1_epi8(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(flags + 8 * i), v);
  }
#endif
  for (; i < bytes; ++i) {
    // A copy of the byte in each place, of which place j keeps bit j, moved to the top by the sum.
    const uint64_t copies = bits[i] * 0x0101010101010101ull & 0x8040201008040201ull;
    const uint64_t eight = ((copies + 0x00406070787c7e7full) >> 7) & 0x0101010101010101ull;
    memcpy(flags + 8 * i, &eight, sizeof(eight));
  }
}

RK_NAMESPACE_END
