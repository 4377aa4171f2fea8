// Philox4x32-10, the counter-based generator behind every mask and every noise sample.
//
// J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
//
// The contract that all implementations share:
//   key     = seed ^ tag of the op kind, low word first
//   counter = (group low, group high, offset low, offset high)
// where (seed, offset) is the caller's rng_state and a group is eight consecutive mask elements:
// element e takes half-word e % 8 of group e / 8, which is word (e % 8) / 2, low half first. Where
// a draw is of 32 bits, a group is four elements, and e takes word e % 4 of group e / 4.
#pragma once

#include <cstdint>

#include "portable.h"

RK_NAMESPACE_BEGIN

// Tags keep the kinds of op, and torch's own Philox streams, from sharing draws.
// reg_kernels/_rng.py makes the same ones for the other implementations.
enum class RngTag : uint64_t {};

// The tag of eight letters, the first one highest.
constexpr RngTag rng_tag(const char (&letters)[9]) {
  uint64_t tag = 0;
  for (int i = 0; i < 8; ++i) tag = tag << 8 | static_cast<unsigned char>(letters[i]);
  return static_cast<RngTag>(tag);
}

constexpr RngTag kDropoutTag = rng_tag("dropout1"), kRoundingTag = rng_tag("rounding");

constexpr int64_t kGroup = 8;  // mask elements drawn by one Philox call

struct PhiloxWords {
  uint32_t w[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

RK_HD PhiloxWords philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  RK_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0;
    const uint64_t p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// One op's stream: draws for `group` under a given rng_state.
struct RngStream {
  uint64_t key;
  uint64_t offset;

  RK_HD RngStream(RngTag tag, uint64_t seed, uint64_t offset)
      : key(seed ^ static_cast<uint64_t>(tag)), offset(offset) {}

  RK_HD PhiloxWords operator()(uint64_t group) const { return philox4x32(key, group, offset); }
};

// Half-word j (0 to 7) of a group's draw.
RK_HD uint32_t half_word(const PhiloxWords& words, int j) {
  return (words.w[j >> 1] >> (16 * (j & 1))) & 0xffffu;
}

RK_NAMESPACE_END
