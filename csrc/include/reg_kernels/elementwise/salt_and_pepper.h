// Impulse noise: y = x or, of a share p of the elements, one of two values.
#pragma once

#include "../elementwise.h"

RK_NAMESPACE_BEGIN

struct SaltAndPepper {
  static constexpr RngTag kTag = rng_tag("impulses");
  static constexpr Form kForms[] = {{"salt_and_pepper", "salt_and_pepper_", DrawnFor::element}};
  static constexpr Number kNumber = kProbability;
  using Draw = uint16_t;
  using Options = Types<double, double, double>;  // the share of salt among them; pepper; salt
  static constexpr bool kReadsDropped = true, kAdds = false;

  // Both shares of all elements, as multiples of 1/65536, which a float has exactly.
  template <typename C>
  static RK_HD void prepare(Numbers<C, 3>& p, double number, const double* options) {
    p.number = static_cast<C>(nearbyint(number * 65536.0) / 65536.0);
    p.options[0] = static_cast<C>(nearbyint(number * options[0] * 65536.0) / 65536.0);
  }

  template <typename T>
  static RK_HD T element(T x, uint16_t bits, const Numbers<compute_t<T>, 3>& p) {
    const auto u = static_cast<compute_t<T>>(bits) * compute_t<T>(0x1p-16);
    const auto impulse = u < p.options[0] ? p.options[2] : p.options[1];
    return u < p.number ? store<T>(impulse) : x;
  }
};

using Op = SaltAndPepper;

RK_NAMESPACE_END
