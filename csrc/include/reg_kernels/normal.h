// Normal numbers from the words of a draw, the same bits in every implementation.
//
// G. Box, M. Muller, "A note on the generation of random normal deviates", Ann. Math. Stat. 29
// (1958): two uniform numbers, a radius' and an angle's, make two independent normal ones.
// Arithmetic is of integers, and of floats by products, a root, and products with a sum that are
// rounded once, so that nothing depends on a library or on which products a compiler joins with
// sums. reference/_philox.py and triton/_random.py have the same steps. Without an instruction that
// rounds once they go by way of double: the same bits for each of the 2^32 words of a radius and of
// an angle, which were all tried.
//
// A radius has 31 bits: r = sqrt(-2 ln(k / 2^31)), |k| up to 2^31, which reaches 6.55, and 6.86 for
// a k of 0. Of a normal distribution 6e-11 lie further out than 6.55. Errors of the polynomials are
// 2e-7 of the radius' square, 5e-8 of the cosine and less of the sine.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "elementary.h"

RK_NAMESPACE_BEGIN

// A draw as a normal number; an op of the random elementwise family has it as its Draw.
struct Normal {
  float value;
};

// What the steps are made of, for one pair. csrc/cpu/normals.h has the same for vectors of pairs.
struct OneLane {
  using Float = float;
  using Word = uint32_t;

  static RK_HD float as_float(uint32_t bits) { return bit_cast<float>(bits); }
  static RK_HD uint32_t as_bits(float value) { return bit_cast<uint32_t>(value); }
  static RK_HD float of_integer(uint32_t word) {
    return static_cast<float>(static_cast<int32_t>(word));
  }
  static RK_HD float product_and_sum(float a, float b, float c) { return multiply_add(a, b, c); }
  static RK_HD float root(float x) { return ::sqrtf(x); }
};

// The two words of a pair and, step by step, two normal numbers of them. In steps, since CPU code
// draws the next words between them (csrc/cpu/random.h).
template <typename L>
struct NormalPair {
  using F = typename L::Float;
  using W = typename L::Word;
  static constexpr int kSteps = 9;

  W radius, angle;
  F first, second;

  template <int kStep>
  RK_HD void step() {
    if constexpr (kStep == 0) {
      k = L::as_bits(L::of_integer(radius));
      // |k| = 2^(31 - e) (1 + v), 1 + v in (1/sqrt 2, sqrt 2]; the constant is 2^31 sqrt 2, as
      // bits, and e stands where a float has its exponent. A 0 becomes v = -1 and e = 30.
      e = (0x4f3504f3u - k) & 0x0f800000u;
      // Half a turn, from -1/2 to 1/2.
      t = L::of_integer(angle) * 0x1p-32f;
    } else if constexpr (kStep == 1) {
      v = L::product_and_sum(L::as_float((k + e) & 0x7fffffffu), 0x1p-31f, -1.0f);
      z = t * t;
    } else if constexpr (kStep == 2) {
      // e - log2(1 + v), by a minimax fit of -log2(1 + v) / v. All are 2^23 times larger, as e is;
      // that and 2 ln 2 is made up for in the coefficients of the sine and the cosine.
      p = L::product_and_sum(1.223156750e+06f, v, -1.963289500e+06f);
      p = L::product_and_sum(p, v, 2.087730500e+06f);
      sine = L::product_and_sum(3.139158798e-05f, z, -2.431178000e-04f);
    } else if constexpr (kStep == 3) {
      p = L::product_and_sum(p, v, -2.408358500e+06f);
      p = L::product_and_sum(p, v, 3.021909000e+06f);
      sine = L::product_and_sum(sine, z, 1.036640839e-03f);
    } else if constexpr (kStep == 4) {
      p = L::product_and_sum(p, v, -4.034276500e+06f);
      p = L::product_and_sum(p, v, 6.051146000e+06f);
      sine = L::product_and_sum(sine, z, -2.100780373e-03f);
    } else if constexpr (kStep == 5) {
      p = L::product_and_sum(p, v, -1.210220200e+07f);
      r = L::root(L::product_and_sum(p, v, L::of_integer(e)));
      sine = L::product_and_sum(sine, z, 1.277122763e-03f);
    } else if constexpr (kStep == 6) {
      sine = sine * t;
      cosine = L::product_and_sum(8.931131742e-05f, z, -5.414370098e-04f);
      cosine = L::product_and_sum(cosine, z, 1.649828861e-03f);
    } else if constexpr (kStep == 7) {
      cosine = L::product_and_sum(cosine, z, -2.006096067e-03f);
      cosine = L::product_and_sum(cosine, z, 4.065207904e-04f);
      // The sign makes a whole turn of it.
      cosine = L::as_float(L::as_bits(cosine) ^ (k & 0x80000000u));
    } else {
      first = r * cosine;
      second = r * sine;
    }
  }

 private:
  W k, e;
  F t, v, z, p, r, sine, cosine;
};

template <int kStep = 0, typename L>
RK_HD void all_steps(NormalPair<L>& pair) {
  pair.template step<kStep>();
  if constexpr (kStep + 1 < NormalPair<L>::kSteps) all_steps<kStep + 1>(pair);
}

template <typename L>
RK_HD NormalPair<L> normal_pair(typename L::Word radius, typename L::Word angle) {
  NormalPair<L> pair;
  pair.radius = radius;
  pair.angle = angle;
  all_steps(pair);
  return pair;
}

RK_NAMESPACE_END
