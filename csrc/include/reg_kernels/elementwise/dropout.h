// Dropout and channel dropout: y = x m, m = 0 or the scale.
#pragma once

#include "../elementwise.h"

RK_NAMESPACE_BEGIN

struct Dropout {
  static constexpr RngTag kTag = kDropoutTag;
  static constexpr Form kForms[] = {{"dropout", "dropout_", DrawnFor::element},
                                    {"feature_dropout", "feature_dropout_", DrawnFor::channel}};
  static constexpr Number kNumber = kProbability;
  using Draw = bool;
  using Options = Types<>;
  static constexpr bool kReadsDropped = true, kAdds = false;

  // A dropped element is multiplied by zero, not replaced by it: NaN, Inf and the sign of zero come
  // out as torch's do.
  template <typename T>
  static RK_HD T element(T x, compute_t<T> scale) {
    return store_product<T>(load(x) * scale);
  }
};

using Op = Dropout;

RK_NAMESPACE_END
