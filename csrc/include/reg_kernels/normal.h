// Normal numbers from the words of a draw, the same bits in every implementation.
//
// G. Box, M. Muller, "A note on the generation of random normal deviates", Ann. Math. Stat. 29
// (1958): two uniform numbers, a radius' and an angle's, make two independent normal ones.
// Arithmetic is of integers, and of floats by products, sums and a root that are each rounded by
// themselves, so that nothing depends on a library or on which products a compiler joins with
// sums. reference/_normal.py and triton/_random.py have the same steps.
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

struct NormalPair {
  float first, second;
};

RK_HD NormalPair normal_pair(uint32_t radius, uint32_t angle) {
  // An odd integer and a sign: 31 bits and a further one, which the pair's sign is.
  const auto k = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(radius | 1u)));
  const uint32_t sign = k & 0x80000000u, bits = k & 0x7fffffffu;
  // |k| = 2^(31 - e) (1 + v), 1 + v in (1/sqrt 2, sqrt 2]; the constant is sqrt 2 2^31, as bits.
  const uint32_t e = (0x4f3504f3u - bits) >> 23;
  const float v = bit_cast<float>(bits + (e << 23) - (31u << 23)) - 1.0f;
  // -2 ln(1 + v) / v.
  float p = 2.021379322e-01f;
  p = add_apart(p * v, -3.244517148e-01f);
  p = add_apart(p * v, 3.450166285e-01f);
  p = add_apart(p * v, -3.980033100e-01f);
  p = add_apart(p * v, 4.993981719e-01f);
  p = add_apart(p * v, -6.667011976e-01f);
  p = add_apart(p * v, 1.000007272e+00f);
  p = add_apart(p * v, -1.999999881e+00f);
  constexpr float kTwiceLog2 = 1.386294361e+00f;
  const float square = add_apart(static_cast<float>(static_cast<int32_t>(e)) * kTwiceLog2, p * v);
  const float r = ::sqrtf(square);
  // A quarter of a turn, t from -1/2 to 1/2; then the sign, and which of the two is the sine, make
  // a whole turn of it.
  const float t = static_cast<float>(static_cast<int32_t>(angle)) * 0x1p-32f;
  const float z = t * t;
  float sine = -4.601657856e-03f;
  sine = add_apart(sine * z, 7.968003303e-02f);
  sine = add_apart(sine * z, -6.459634900e-01f);
  sine = add_apart(sine * z, 1.570796371e+00f);
  sine = sine * t;
  float cosine = -2.042624913e-02f;
  cosine = add_apart(cosine * z, 2.536063492e-01f);
  cosine = add_apart(cosine * z, -1.233698010e+00f);
  cosine = add_apart(cosine * z, 1.0f);
  cosine = bit_cast<float>(bit_cast<uint32_t>(cosine) ^ sign);
  const bool swapped = (angle & 1u) != 0;
  return {r * (swapped ? sine : cosine), r * (swapped ? cosine : sine)};
}

RK_NAMESPACE_END
