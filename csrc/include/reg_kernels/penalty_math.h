// One element of an L1 or L2 penalty, and its gradient, shared by the CPU and the CUDA kernels.
#pragma once

#include "dtypes.h"

namespace reg_kernels {

// Numbered by the power: the sum of |x|, or of x^2.
enum class Penalty { l1 = 1, l2 = 2 };

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

// A sum of doubles that keeps what each addition rounds off: of partial sums, in whatever order, it
// is nearly always the rounded exact one. D. Knuth, "The art of computer programming", vol. 2,
// section 4.2.2, theorem B.
struct ExactSum {
  double total = 0, lost = 0;

  RK_HD void add(double x) {
    const double sum = total + x;
    const double of_x = sum - total;
    lost += (total - (sum - of_x)) + (x - of_x);
    total = sum;
  }

  // An infinity or a NaN is lost in what is kept of it.
  RK_HD double value() const { return total - total == 0 ? total + lost : total; }
};

// d/dx of |x| (0 at 0, as torch has it) or of x^2, times the incoming gradient.
template <Penalty kPenalty, typename C>
RK_HD C penalty_gradient(C x, C grad_output) {
  if constexpr (kPenalty == Penalty::l2) return C(2) * x * grad_output;
  // NaN is neither above nor below; torch's sign of it is 0 on the CPU, and so it is here.
  return x > C(0) ? grad_output : (x < C(0) ? -grad_output : C(0) * grad_output);
}

RK_NAMESPACE_END
