// Gaussian noise: y = x + std z, or y = x (1 + std z).
#pragma once

#include "../elementwise.h"

RK_NAMESPACE_BEGIN

struct GaussianNoise {
  static constexpr RngTag kTag = rng_tag("gaussian");
  static constexpr Form kForms[] = {{"gaussian_noise", "gaussian_noise_", DrawnFor::element}};
  static constexpr Number kNumber = kDeviation;
  using Draw = Normal;
  using Options = Types<bool>;  // whether the noise is multiplied by x
  static constexpr bool kReadsDropped = true, kAdds = false;

  template <typename T>
  static RK_HD T element(T x, Normal z, const Numbers<compute_t<T>, 1>& std) {
    return with_noise(x, std.number * static_cast<compute_t<T>>(z.value), std.options[0] != 0);
  }
};

using Op = GaussianNoise;

RK_NAMESPACE_END
