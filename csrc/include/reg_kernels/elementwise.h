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
//                  kNumber is the probability of the contrary. Or uint16_t or uint32_t: the bits.
//                  Or Normal (normal.h): a normal number
//   Options        the types of the numbers that its schema has behind kNumber, `Types<...>`: bool
//                  or double
//   kReadsDropped  whether a dropped element is read too and multiplied by 0; true for an op that
//                  drops none
//   kAdds          whether a residual is added, in the same pass. An op of samples that adds one
//                  takes a layer scale as well: a factor for each channel of what is kept
//   element(x, scale), element(x, scale, residual)
//                  the result of an element that is kept, rounded once at the end. A dropped
//                  element that is read has a scale of 0 here; if it is not read, the result is 0,
//                  or the residual. The option of such an op says whether what is kept is scaled
//   element(x, draw, numbers), element(x, draw, numbers, residual)
//                  the same where Draw is another one, with kNumber and the options as Numbers
//   prepare(numbers, number, options)
//                  where these are to be changed first: sets Numbers from what they are in double
// An op of elements that keeps or drops none takes bytes as well.
#pragma once

#include "bytes.h"
#include "channel_layout.h"
#include "dropout_math.h"
#include "dtypes.h"
#include "normal.h"
#include "philox.h"

namespace reg_kernels {

// A factor for each channel: that of element i, in storage order, is values[i / inner % channels].
// One for all instruction sets.
struct LayerScale {
  const void* values;  // [channels] in the type of computing, or null: no layer scale
  int64_t channels, inner;
};

}  // namespace reg_kernels

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

template <typename... Option>
struct Types {
  static constexpr int kCount = sizeof...(Option);
};
constexpr int kMostOptions = 3;

// The type whose bits a draw takes of its group.
template <typename Draw>
struct DrawnBits {
  using type = Draw;
};
template <>
struct DrawnBits<bool> {
  using type = uint16_t;
};
template <>
struct DrawnBits<Normal> {
  using type = uint32_t;
};
template <typename Op>
using drawn_t = typename DrawnBits<typename Op::Draw>::type;

template <typename Op>
constexpr bool kKeepsOrDrops = sizeof(typename Op::Draw) < sizeof(drawn_t<Op>);
// Whether draws are in pairs of words, of which both are needed for either.
template <typename Op>
constexpr bool kDrawsNormals = requires(typename Op::Draw draw) { draw.value; };
template <typename Op>
constexpr bool kTakesBytes = !kKeepsOrDrops<Op> && has_form<Op>(DrawnFor::element);
template <typename Op>
constexpr bool kSkipsDropped = !Op::kReadsDropped;
// Whether each element is a product with 0 or the scale, and nothing else.
template <typename Op>
constexpr bool kMultiplies = kKeepsOrDrops<Op> && Op::kReadsDropped && !Op::kAdds;

template <typename Op>
constexpr bool kScalesChannels = Op::kAdds && has_form<Op>(DrawnFor::sample);

// A walk through the factors of a layer scale from an element on.
template <typename C, typename Index = int64_t>
class FactorCursor {
 public:
  RK_HD FactorCursor(const LayerScale& of, Index element)
      : values_(static_cast<const C*>(of.values)),
        channels_(static_cast<Index>(of.channels)),
        inner_(static_cast<Index>(of.inner)),
        channel_(element / inner_ % channels_),
        step_(element % inner_) {}

  // The factors of this element and of those behind it, and how many lie side by side in `values`
  // or, where `same`, have this one.
  RK_HD const C* values() const { return values_ + channel_; }
  RK_HD bool same() const { return inner_ > 1; }
  RK_HD Index run() const { return same() ? inner_ - step_ : channels_ - channel_; }

  // No further than a run goes.
  RK_HD void advance(Index count) {
    step_ += same() ? count : 0;
    channel_ += same() ? (step_ == inner_) : count;
    if (step_ == inner_) step_ = 0;
    if (channel_ == channels_) channel_ = 0;
  }

 private:
  const C* values_;
  Index channels_, inner_, channel_, step_;
};

// An op's number and options in the type of computing, where it does not keep or drop.
template <typename C, int kOptions>
struct Numbers {
  C number;
  C options[kOptions];
};
template <typename C>
struct Numbers<C, 0> {
  C number;
};

// What an element is told beside its draw: those, or the scale of what is kept.
template <typename Op, typename T, bool = kKeepsOrDrops<Op>>
struct FactorOf {
  using type = Numbers<compute_t<T>, Op::Options::kCount>;
  static RK_HD type from(double number, [[maybe_unused]] const double* options) {
    type factor{};
    factor.number = static_cast<compute_t<T>>(number);
    if constexpr (Op::Options::kCount > 0) {
      for (int i = 0; i < Op::Options::kCount; ++i) {
        factor.options[i] = static_cast<compute_t<T>>(options[i]);
      }
    }
    if constexpr (requires { Op::prepare(factor, number, options); }) {
      Op::prepare(factor, number, options);
    }
    return factor;
  }
};
template <typename Op, typename T>
struct FactorOf<Op, T, true> {
  using type = compute_t<T>;
  static RK_HD type from(double scale, const double* options) {
    const bool scaled = Op::Options::kCount == 0 || options[0] != 0;
    return scaled ? static_cast<type>(scale) : type(1);
  }
};
template <typename Op, typename T>
using factor_t = typename FactorOf<Op, T>::type;

// The op's number as its kernels use it.
template <typename Op>
RK_HD DropoutRate rate_of(double number) {
  if constexpr (kKeepsOrDrops<Op>) return DropoutRate::from_probability(number);
  return {0, number};
}

// The result of an element beside noise, which may be relative to it.
template <typename T>
RK_HD T with_noise(T x, compute_t<T> noise, bool relative) {
  const compute_t<T> value = load(x);
  return store<T>(add_apart(value, noise * (relative ? value : compute_t<T>(1))));
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
RK_HD T element_of(T x, typename Op::Draw draw, const factor_t<Op, T>& factor,
                   Residual... residual) {
  if constexpr (!kKeepsOrDrops<Op>) {
    return Op::element(x, draw, factor, residual...);
  } else if constexpr (Op::kReadsDropped) {
    return Op::element(x, draw ? factor : compute_t<T>(0), residual...);
  } else {
    return draw ? Op::element(x, factor, residual...) : left_of_dropped<T>(residual...);
  }
}

RK_NAMESPACE_END
