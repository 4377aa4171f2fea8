// Dropout's arguments as both launchers, CPU and CUDA, read them.
#pragma once

#include "checks.h"
#include "reg_kernels/dropout_math.h"

namespace reg_kernels {

// How a feature-dropout input (N, C, ...) lies in memory. `input` is contiguous, or dense with the
// channels last: what reg_kernels/ops/dropout.py makes of any other.
inline ChannelLayout channel_layout(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 2, "feature_dropout: expected at least 2 dimensions, got ",
                  input.dim());
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
    STD_TORCH_CHECK(channels_last, "feature_dropout: expected a contiguous or channels-last input");
    layout.channels_last = true;
  }
  return layout;
}

}  // namespace reg_kernels
