// Calls the leaves of csrc/cpu/penalty.simd.cpp.
#include "cpu/penalty.h"

#include "isas.h"

namespace isas {

void call_leaves() {
  for_types([]<typename T>(T) {
    for (const Penalty penalty : {Penalty::l1, Penalty::l2}) {
      const int power = penalty == Penalty::l1 ? 1 : 2;
      for (const int64_t count : {1, 7, 8, 31, 32, 33, 1000}) {
        const auto x = numbers<T>(count + 3);
        const double sum = RK_LEAF(penalty_sum)(x.data(), kDType<T>, penalty, 3, count + 3);
        Digest of_sum;
        of_sum.add(&sum, 1);
        of_sum.report("penalty_sum, %s, L%d, %d elements", kName<T>, power, int(count));

        const auto any = any_values<T>(count + 3);
        Buffer<T> y(count + 3, 0);
        share_out(3, count + 3, 64, [&](int64_t begin, int64_t end) {
          RK_LEAF(penalty_gradient_range)
          (any.data(), y.data(), kDType<T>, penalty, 0.37, begin, end);
        });
        Digest of_gradient;
        of_gradient.add(y);
        of_gradient.report("penalty_gradient_range, %s, L%d, %d elements", kName<T>, power,
                           int(count));
      }
    }
  });
}

}  // namespace isas
