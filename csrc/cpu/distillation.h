// What csrc/cpu/distillation.cpp hands to the loops of csrc/cpu/distillation.simd.cpp.
#pragma once

#include "cross_entropy.h"
#include "reg_kernels/distillation_math.h"

namespace reg_kernels {

struct DistillationTask {
  LossTask loss;        // of the student's logits and their labels
  const void* teacher;  // in the student's layout
  DType teacher_dtype;  // the student's, or a narrower one than it is computed in, or that
  double temperature, alpha;
};

// Units [begin, end), forward or backward.
RK_DECLARE_LEAF(void, distillation_units,
                (const DistillationTask& task, int64_t begin, int64_t end))
RK_DECLARE_LEAF(void, distillation_backward_units,
                (const DistillationTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels
