// What csrc/cpu/optimizer_step.cpp hands to the loops of csrc/cpu/optimizer_step.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/optimizer_step_math.h"

namespace reg_kernels {

// One tensor and its state, each a dense array in one order; null where there is none.
struct OptimizerTask {
  Algorithm algorithm;
  Rounding rounding;
  bool coupled;         // the l2 penalty's gradient is wanted
  DType dtype;          // of param, grad and compensation; ema has its compute type
  DType moments_dtype;  // of the moments
  void* param;
  const void* grad;
  void* first_moment;
  void* second_moment;
  void* max_second_moment;
  void* ema;
  void* compensation;
  OptimizerConstants constants;
  DrawPlaces places;      // of the draws of Rounding::stochastic
  uint64_t seed, offset;  // rng_state
};

// Updates elements [begin, end); `begin` is a multiple of 64.
RK_DECLARE_LEAF(void, optimizer_step_range, (const OptimizerTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels
