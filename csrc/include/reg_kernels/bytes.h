// Bytes as elements, which are computed in float.
#pragma once

#include <cstdint>

#include "dtypes.h"

RK_NAMESPACE_BEGIN

// A byte counts as its value, from 0 to 255.
RK_HD float load(uint8_t value) { return static_cast<float>(value); }

// Rounded to nearest even and held to [0, 255]; a NaN becomes 0.
template <>
struct Store<uint8_t> {
  static RK_HD uint8_t from(float value) {
    const float least = value > 0.0f ? value : 0.0f;
    const float held = least < 255.0f ? least : 255.0f;
    // Adding 1.5 2^23 rounds to an integer, which the low bits then are.
    return static_cast<uint8_t>(bit_cast<uint32_t>(add_apart(held, 0x1.8p23f)));
  }
};

RK_NAMESPACE_END
