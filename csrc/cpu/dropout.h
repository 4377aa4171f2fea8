// What csrc/cpu/dropout.cpp hands to the loops of csrc/cpu/dropout.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/dtypes.h"

namespace reg_kernels {

struct DropoutTask {
  const void* x;  // element 0 in storage order
  void* y;        // likewise; may be x
  int64_t numel;
  DType dtype;
  int64_t mask_offset;  // mask index of element 0, or of channel (0, 0)
  uint32_t threshold;   // DropoutRate
  double scale;
  uint64_t seed, offset;  // rng_state
  bool stream;            // whether y is large enough for streaming stores

  // Feature dropout: x is a dense (N, C, L).
  int64_t channels, length;
  bool channels_last;
};

// Elements [begin, end) of dropout.
RK_DECLARE_LEAF(void, dropout_range, (const DropoutTask& task, int64_t begin, int64_t end))
// Rows [begin, end) of feature dropout: the N * C planes of L elements, or for channels last the
// N * L positions of C elements.
RK_DECLARE_LEAF(void, feature_dropout_range, (const DropoutTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels
