// rng_state as a kernel argument, two integers by value, or a pointer where a CUDA graph or a
// compiled program draws the state on the device itself; and a group's mask from its draw.
#pragma once

#include "philox.h"

RK_NAMESPACE_BEGIN
namespace cuda {

struct RngState {
  const int64_t* on_device;  // [seed, offset], or null: then the two values below
  uint64_t seed;
  uint64_t offset;

  __device__ RngStream stream(RngTag tag) const {
    if (on_device) {
      return {tag, static_cast<uint64_t>(on_device[0]), static_cast<uint64_t>(on_device[1])};
    }
    return {tag, seed, offset};
  }
};

// Bit j is set when half-word j keeps its element.
__device__ __forceinline__ uint32_t keep_bits(const PhiloxWords& words, uint32_t threshold) {
  uint32_t bits = 0;
  RK_UNROLL
  for (int j = 0; j < kGroup; ++j) bits |= (half_word(words, j) < threshold ? 1u : 0u) << j;
  return bits;
}

}  // namespace cuda
RK_NAMESPACE_END
