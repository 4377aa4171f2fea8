// What the programs of the losses of logits share: cases' arguments and places, memory, and when a
// number is near another.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "driver.h"
#include "reg_kernels/loss.cuh"

namespace driver {

using Real = long double;

constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
constexpr int64_t kIgnored = -100;
constexpr double kLam = 0.3;  // where it is a number

// A case is of logits (N, C, S), S positions a sample: where class c of a position lies.
template <typename Case>
int64_t place(const Case& of, int64_t position, int64_t c) {
  return of.classes_last ? position * of.C + c
                         : (position / of.S * of.C + c) * of.S + position % of.S;
}

// What a case says of a loss's arguments; its smoothing may lie in memory, and what is said beside
// it does not count then.
template <typename Arguments, typename Case>
void set_case(Arguments& a, const Case& of) {
  a.positions = of.positions();
  a.classes = of.C;
  a.length = of.classes_last ? 1 : of.S;
  a.reduction = of.reduction;
  a.labels.positions = of.S;
  a.labels.classes = of.C;
  a.labels.ignore_index = kIgnored;
  a.labels.one_lam = kLam;
  a.labels.smoothing = of.traced ? 2.0 : of.smoothing;
  a.labels.traced_smoothing = of.traced ? &of.smoothing : nullptr;
}

// Whether `actual` is within `error`; where the expected value is not finite, whether it is that.
inline bool is_near(Real actual, Real expected, Real error) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected)) return actual == expected;
  return std::fabs(actual - expected) <= error;
}

// Device memory to the byte, of which nothing may be assumed.
struct Memory {
  std::vector<std::unique_ptr<unsigned char[]>> blocks;

  void* operator()(int64_t bytes) {
    blocks.emplace_back(new unsigned char[bytes]);
    std::memset(blocks.back().get(), 0xa5, bytes);
    return blocks.back().get();
  }
};

}  // namespace driver
