// One bit an element: eight flags, bytes of 0 or 1, to and from a byte.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/portable.h"

RK_NAMESPACE_BEGIN

// Packs `count` flags, bit 0 first, into whole bytes; what is left of the last one becomes 0.
RK_HD void pack_bits(const uint8_t* flags, int64_t count, uint8_t* bits) {
  const int64_t whole = count / 8;
  for (int64_t i = 0; i < whole; ++i) {
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
  for (int64_t i = 0; i < ceil_div(count, 8); ++i) {
    // A copy of the byte in each place, of which place j keeps bit j, moved to the top by the sum.
    const uint64_t copies = bits[i] * 0x0101010101010101ull & 0x8040201008040201ull;
    const uint64_t eight = ((copies + 0x00406070787c7e7full) >> 7) & 0x0101010101010101ull;
    memcpy(flags + 8 * i, &eight, sizeof(eight));
  }
}

RK_NAMESPACE_END
