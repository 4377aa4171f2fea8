// An op for the test of its family: 16 bits of a draw as a number, beside a residual or without.
#pragma once

#include "reg_kernels/elementwise.h"

RK_NAMESPACE_BEGIN

struct HalfWords {
  static constexpr RngTag kTag = rng_tag("halfword");
  static constexpr Form kForms[] = {{"half_words", nullptr, DrawnFor::element},
                                    {"half_words_of_channels", nullptr, DrawnFor::channel}};
  static constexpr Number kNumber = {"width", 0.0, 1e9};
  using Draw = uint16_t;
  using Options = Types<>;
  static constexpr bool kReadsDropped = true, kAdds = true;

  template <typename T>
  static RK_HD T element(T x, uint16_t bits, const Numbers<compute_t<T>, 0>& width) {
    return store<T>(add_apart(load(x), width.number * bits));
  }
  template <typename T>
  static RK_HD T element(T x, uint16_t bits, const Numbers<compute_t<T>, 0>& width, T residual) {
    return store<T>(add_apart(add_apart(load(x), width.number * bits), load(residual)));
  }
};

using Op = HalfWords;

RK_NAMESPACE_END
