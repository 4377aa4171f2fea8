// Stochastic depth: y = residual + x m, m = 0 or the scale for a whole sample.
#pragma once

#include "../elementwise.h"

RK_NAMESPACE_BEGIN

struct DropPath {
  static constexpr RngTag kTag = rng_tag("droppath");
  static constexpr Form kForms[] = {{"drop_path", nullptr, DrawnFor::sample}};
  static constexpr Number kNumber = kProbability;
  using Draw = bool;
  using Options = Types<bool>;  // whether what is kept is scaled
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

using Op = DropPath;

RK_NAMESPACE_END
