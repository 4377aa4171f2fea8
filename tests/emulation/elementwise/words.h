// An op for the test of its family: 32 bits of a draw as a number.
#pragma once

#include "reg_kernels/elementwise.h"

RK_NAMESPACE_BEGIN

struct Words {
  static constexpr RngTag kTag = rng_tag("allwords");
  static constexpr Form kForms[] = {{"words", "words_", DrawnFor::element},
                                    {"words_of_channels", nullptr, DrawnFor::channel},
                                    {"words_of_samples", nullptr, DrawnFor::sample}};
  static constexpr Number kNumber = {"width", 0.0, 1e9};
  using Draw = uint32_t;
  using Options = Types<>;
  static constexpr bool kReadsDropped = true, kAdds = false;

  // As whole numbers of a half-word each, which every type has exactly.
  template <typename T>
  static RK_HD T element(T x, uint32_t bits, const Numbers<compute_t<T>, 0>& width) {
    const auto low = static_cast<compute_t<T>>(bits & 0xffffu);
    const auto high = static_cast<compute_t<T>>(bits >> 16);
    return store<T>(add_apart(add_apart(load(x), width.number * low), high));
  }
};

using Op = Words;

RK_NAMESPACE_END
