// Calls the leaves of csrc/cpu/cross_entropy.simd.cpp.
#include "losses.h"

namespace isas {

void call_leaves() {
  constexpr int64_t kShortRows = 56;
  for_types([&]<typename T>(T) {
    for_losses([&](int64_t samples, int64_t classes, int64_t length, bool classes_last,
                   Target target, bool weighted, bool stream) {
      Loss<T> loss(samples, classes, length, classes_last, kShortRows, target, weighted, stream, 2);
      loss.call(
          "cross_entropy",
          [&](int64_t begin, int64_t end) { RK_LEAF(cross_entropy_units)(loss.task, begin, end); },
          [&](int64_t begin, int64_t end) {
            RK_LEAF(cross_entropy_backward_units)(loss.task, begin, end);
          });
    });
  });
}

}  // namespace isas
