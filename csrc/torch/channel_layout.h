// How the input of an op on channels lies in memory, as the launchers of CPU and CUDA read it.
#pragma once

#include "checks.h"
#include "reg_kernels/channel_layout.h"

namespace reg_kernels {

// The layout of an input (N, C, ...): contiguous, or dense with the channels last, which is what
// reg_kernels/ops/ makes of any other.
inline ChannelLayout channel_layout(const Tensor& input, const char* op) {
  STD_TORCH_CHECK(input.dim() >= 2, op, ": expected at least 2 dimensions, got ", input.dim());
  const int64_t rows = input.size(0) * input.size(1);
  ChannelLayout layout{input.size(1), rows ? input.numel() / rows : 0, false};
  if (!input.is_contiguous()) {
    // Dense, with stride 1 between channels and the rest in order.
    int64_t expected = layout.channels;
    bool channels_last = layout.channels == 1 || input.stride(1) == 1;
    for (int64_t d = input.dim() - 1; d >= 0; --d) {
      if (d == 1 || input.size(d) == 1) continue;
      channels_last = channels_last && input.stride(d) == expected;
      expected *= input.size(d);
    }
    STD_TORCH_CHECK(channels_last, op, ": expected a contiguous or channels-last input");
    layout.channels_last = true;
  }
  return layout;
}

}  // namespace reg_kernels
