// How a dense (N, C, L) tensor lies in memory.
#pragma once

#include <cstdint>

#include "portable.h"

RK_NAMESPACE_BEGIN

// Either each channel's L values lie together (channels first), or the C channels of a position do
// (channels last).
struct ChannelLayout {
  int64_t channels;  // C
  int64_t length;    // L, the product of the spatial sizes
  bool channels_last;
};

RK_NAMESPACE_END
