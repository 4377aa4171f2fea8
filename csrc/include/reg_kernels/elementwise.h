// The random elementwise family: its ops draw a number for each element, channel or sample, and
// compute each element of the result from the one of x in the same place.
//
// An op of the family is one header, elementwise/<op>.h. setup.py finds it by its place and
// compiles csrc/cpu/elementwise.cpp, elementwise.simd.cpp and csrc/cuda/elementwise.cu with that
// header included first. It defines a struct, names it with `using Op = `, and has in the struct:
//   kTag           a number that keeps its draws apart from those of other ops
//   kForms         the registered ops: their names, and what one draw is for
//   kNumber        name and range of the number that says how much: a probability, a deviation
//   Draw           what an element gets of its draw. Either bool: whether the element is kept, and
//                  kNumber is the probability of the contrary. Or uint16_t or uint32_t: the bits
//   kReadsDropped  whether a dropped element is read too and multiplied by 0; true for an op that
//                  drops none
//   kAdds          whether a residual is added, in the same pass
//   element(x, scale), element(x, scale, residual)
//                  the result of an element that is kept, rounded once at the end. A dropped
//                  element that is read has a scale of 0 here; if it is not read, the result is 0,
//                  or the residual
//   element(x, bits, number), element(x, bits, number, residual)
//                  the same where Draw is bits
#pragma once

#include "channel_layout.h"
#include "dropout_math.h"
#include "dtypes.h"
#include "philox.h"

RK_NAMESPACE_BEGIN

// What one draw is for, in storage order: an element; a channel of an (N, C, L); a sample, which
// is a channel of an (N, 1, L).
enum class DrawnFor { element, channel, sample };

struct Form {
  const char* name;
  const char* in_place;  // or null
  DrawnFor drawn_for;
};

template <typename Op>
constexpr bool has_form(DrawnFor drawn_for) {
  for (const Form& form : Op::kForms) {
    if (form.drawn_for == drawn_for) return true;
  }
  return false;
}

// The type whose bits a draw takes of its group.
template <typename Draw>
struct DrawnBits {
  using type = Draw;
};
template <>
struct DrawnBits<bool> {
  using type = uint16_t;
};
template <typename Op>
using drawn_t = typename DrawnBits<typename Op::Draw>::type;

template <typename Op>
constexpr bool kKeepsOrDrops = sizeof(typename Op::Draw) < sizeof(drawn_t<Op>);
template <typename Op>
constexpr bool kSkipsDropped = !Op::kReadsDropped;
// Whether each element is a product with 0 or the scale, and nothing else.
template <typename Op>
constexpr bool kMultiplies = kKeepsOrDrops<Op> && Op::kReadsDropped && !Op::kAdds;

// The op's number as its kernels use it.
template <typename Op>
RK_HD DropoutRate rate_of(double number) {
  if constexpr (kKeepsOrDrops<Op>) return DropoutRate::from_probability(number);
  return {0, number};
}

// The result of a dropped element that is not read.
template <typename T>
RK_HD T left_of_dropped() {
  return {};
}
template <typename T>
RK_HD T left_of_dropped(T residual) {
  return residual;
}

// One element of the result; `residual` is one number, or left out.
template <typename Op, typename T, typename... Residual>
RK_HD T element_of(T x, typename Op::Draw draw, compute_t<T> scale, Residual... residual) {
  if constexpr (!kKeepsOrDrops<Op>) {
    return Op::element(x, draw, scale, residual...);
  } else if constexpr (Op::kReadsDropped) {
    return Op::element(x, draw ? scale : compute_t<T>(0), residual...);
  } else {
    return draw ? Op::element(x, scale, residual...) : left_of_dropped<T>(residual...);
  }
}

RK_NAMESPACE_END
