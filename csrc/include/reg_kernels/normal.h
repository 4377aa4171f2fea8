// Normal numbers from the words of a draw, the same bits in every implementation.
//
// G. Box, M. Muller, "A note on the generation of random normal deviates", Ann. Math. Stat. 29
// (1958): two uniform numbers, a radius' and an angle's, make two independent normal ones.
// Arithmetic is of integers, and of floats by products, sums and a root that are each rounded by
// themselves, so that nothing depends on a library or on which products a compiler joins with
// sums. reference/_philox.py and triton/_random.py have the same steps.
//
// A radius has 31 bits: r = sqrt(-2 ln(k / 2^31)), k odd, which reaches 6.55. Of a normal
// distribution 6e-11 lie further out. Errors of the polynomials are 2e-7 of the radius' square and
// 3e-8 of the sine and the cosine.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

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
  template <typename Addend>
  static RK_HD float sum(float a, Addend b) {
    return add_apart(a, b);
  }
  static RK_HD float root(float x) { return ::sqrtf(x); }
  static RK_HD float either(uint32_t word, float if_odd, float if_even) {
    return word & 1u ? if_odd : if_even;
  }
};

template <typename L>
struct NormalPair {
  typename L::Float first, second;
};

template <typename L>
RK_HD NormalPair<L> normal_pair(typename L::Word radius, typename L::Word angle) {
  using F = typename L::Float;
  using W = typename L::Word;
  // An odd integer of 31 bits, and a further bit as its sign.
  const W k = L::as_bits(L::of_integer(radius | 1u));
  const W sign = k & 0x80000000u, bits = k & 0x7fffffffu;
  // |k| = 2^(31 - e) (1 + v), 1 + v in (1/sqrt 2, sqrt 2]; the constant is 2^31 sqrt 2, as bits.
  const W e = (0x4f3504f3u - bits) >> 23;
  const F v = L::as_float(bits + (e << 23) - (31u << 23)) - 1.0f;
  // -2 ln(1 + v) / v, by pairs and pairs of pairs: fewer operations wait for another.
  const F v2 = v * v;
  const F p01 = L::sum(v * 1.000007272e+00f, -1.999999881e+00f);
  const F p23 = L::sum(v * 4.993981719e-01f, -6.667011976e-01f);
  const F p45 = L::sum(v * 3.450166285e-01f, -3.980033100e-01f);
  const F p67 = L::sum(v * 2.021379322e-01f, -3.244517148e-01f);
  const F low = L::sum(p23 * v2, p01), high = L::sum(p67 * v2, p45);
  const F p = L::sum(high * (v2 * v2), low);
  constexpr float kTwiceLog2 = 1.386294361e+00f;
  const F r = L::root(L::sum(L::of_integer(e) * kTwiceLog2, p * v));
  // A quarter of a turn, t from -1/2 to 1/2; the sign, and which of the two is the sine, make a
  // whole turn of it.
  const F t = L::of_integer(angle) * 0x1p-32f, z = t * t;
  F sine = L::sum(z * -4.601657856e-03f, 7.968003303e-02f);
  sine = L::sum(sine * z, -6.459634900e-01f);
  sine = L::sum(sine * z, 1.570796371e+00f) * t;
  F cosine = L::sum(z * -2.042624913e-02f, 2.536063492e-01f);
  cosine = L::sum(cosine * z, -1.233698010e+00f);
  cosine = L::as_float(L::as_bits(L::sum(cosine * z, 1.0f)) ^ sign);
  return {r * L::either(angle, sine, cosine), r * L::either(angle, cosine, sine)};
}

RK_NAMESPACE_END
