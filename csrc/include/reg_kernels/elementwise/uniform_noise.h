// Uniform noise: y = x + amplitude u, or y = x (1 + amplitude u), u from -1 to 1.
#pragma once

#include "../elementwise.h"

RK_NAMESPACE_BEGIN

struct UniformNoise {
  static constexpr RngTag kTag = rng_tag("uniforms");
  static constexpr Form kForms[] = {{"uniform_noise", "uniform_noise_", DrawnFor::element}};
  static constexpr Number kNumber = {"amplitude", 0.0, kDeviation.most};
  using Draw = uint32_t;
  using Options = Types<bool>;  // whether the noise is multiplied by x
  static constexpr bool kReadsDropped = true, kAdds = false;

  template <typename T>
  static RK_HD T element(T x, uint32_t bits, const Numbers<compute_t<T>, 1>& amplitude) {
    const auto u = static_cast<compute_t<T>>(static_cast<int32_t>(bits)) * compute_t<T>(0x1p-31);
    return with_noise(x, amplitude.number * u, amplitude.options[0] != 0);
  }
};

using Op = UniformNoise;

RK_NAMESPACE_END
