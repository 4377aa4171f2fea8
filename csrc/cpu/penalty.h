// What csrc/cpu/penalty.cpp hands to the loops of csrc/cpu/penalty.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/dtypes.h"
#include "reg_kernels/penalty_math.h"

namespace reg_kernels {

// The sum over x[begin, end), in double.
RK_DECLARE_LEAF(double, penalty_sum,
                (const void* x, DType dtype, Penalty penalty, int64_t begin, int64_t end))

// y[i] = the gradient at x[i], for i in [begin, end).
RK_DECLARE_LEAF(void, penalty_gradient_range,
                (const void* x, void* y, DType dtype, Penalty penalty, double grad_output,
                 int64_t begin, int64_t end))

}  // namespace reg_kernels
