// What csrc/cpu/elementwise.cpp hands to the loops of csrc/cpu/elementwise.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/elementwise.h"

namespace reg_kernels {

struct ElementwiseTask {
  const void* x;         // element 0 in storage order
  void* y;               // likewise; may be x
  const void* residual;  // likewise, or null
  int64_t numel;
  DType dtype;
  bool bytes;           // whether elements are bytes, of an op that takes them, and dtype is idle
  int64_t mask_offset;  // mask index of element 0, of channel (0, 0) or of sample 0
  uint32_t threshold;   // DropoutRate
  double scale;
  double options[kMostOptions];
  uint64_t seed, offset;  // rng_state
  bool stream;            // whether y is large enough for streaming stores

  // Of an op whose draws are each for a channel or a sample: x is a dense (N, C, L).
  int64_t channels, length;
  bool channels_last;

  LayerScale layer_scale;
};

// One function for each op, which its tag tells.
constexpr auto kOpTag = static_cast<uint64_t>(Op::kTag);

// Elements [begin, end), each with its own draw:
RK_DECLARE_LEAF(template <uint64_t kTag> void, elements_range,
                (const ElementwiseTask& task, int64_t begin, int64_t end))
RK_DECLARE_LEAF(template <> void, elements_range<kOpTag>,
                (const ElementwiseTask& task, int64_t begin, int64_t end))
// Elements [begin, end) of one draw for L elements or, with the channels last, the positions
// [begin, end) of C elements:
RK_DECLARE_LEAF(template <uint64_t kTag> void, channels_range,
                (const ElementwiseTask& task, int64_t begin, int64_t end))
RK_DECLARE_LEAF(template <> void, channels_range<kOpTag>,
                (const ElementwiseTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels
