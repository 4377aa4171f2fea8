// What csrc/cpu/subset.cpp hands to the loops of csrc/cpu/subset.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/subset_math.h"

namespace reg_kernels {

struct SubsetTask {
  const void *x, *residual;  // residual: null for zeros
  void* y;
  DType dtype;
  int64_t numel;  // of a sample
  // The sample of x that one of y is made of; below 0 where only the residual is left.
  const int64_t* sources;
  double scale;
  bool stream;
};

// Elements [begin, end) of y.
RK_DECLARE_LEAF(void, subset_range, (const SubsetTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels
