// An op for the test of its family: elements and channels are dropped, unread, beside a residual.
#pragma once

#include "reg_kernels/elementwise.h"

RK_NAMESPACE_BEGIN

struct KeptBeside {
  static constexpr RngTag kTag = rng_tag("keptside");
  static constexpr Form kForms[] = {{"kept_beside", nullptr, DrawnFor::element},
                                    {"kept_beside_of_channels", nullptr, DrawnFor::channel}};
  static constexpr Number kNumber = kProbability;
  using Draw = bool;
  using Options = Types<bool>;
  static constexpr bool kReadsDropped = false, kAdds = true;

  template <typename T>
  static RK_HD T element(T x, compute_t<T> scale) {
    return store<T>(load(x) * scale);
  }
  template <typename T>
  static RK_HD T element(T x, compute_t<T> scale, T residual) {
    return store<T>(add_apart(load(residual), load(x) * scale));
  }
};

using Op = KeptBeside;

RK_NAMESPACE_END
