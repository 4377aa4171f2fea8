// What csrc/cpu/augment.cpp hands to the loops of csrc/cpu/augment.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/augment_math.h"

namespace reg_kernels {

struct AugmentTask {
  AugmentBatch batch;
  bool stream;  // whether the result is large enough for streaming stores
};

// Samples [begin, end), one after the other.
RK_DECLARE_LEAF(void, augment_range, (const AugmentTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels
