// How the input of an op on channels lies in memory, as the launchers of CPU and CUDA read it.
#pragma once

#include "checks.h"
#include "reg_kernels/channel_layout.h"

namespace reg_kernels {

// The layout of an input (N, C, ...): contiguous, or dense with the channels last, which is what
// reg_kernels/ops/ makes of any other.
inline ChannelLayout channel_layout(const Tensor& input, const char* op,
                                    const char* name = "input") {
  const auto sizes = input.sizes();
  RK_REQUIRE(sizes.size() >= 2, op, name, "of at least 2 dimensions", input);
  ChannelLayout layout{sizes[1], 1, false};
  for (size_t d = 2; d < sizes.size(); ++d) {
    layout.length = checked_product(layout.length, sizes[d], op);
  }
  if (!input.is_contiguous()) {
    // Dense, with stride 1 between channels and the rest in order.
    const auto strides = input.strides();
    int64_t expected = layout.channels;
    bool channels_last = layout.channels == 1 || strides[1] == 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      if (d == 1 || sizes[d] == 1) continue;
      channels_last = channels_last && strides[d] == expected;
      expected *= sizes[d];
    }
    RK_REQUIRE(channels_last, op, name, "contiguous, or dense with the channels last", input);
    layout.channels_last = true;
  }
  return layout;
}

// The layout of a batch (N, C, ...); of (N,) or (N, C) the positions of a channel are 1.
inline ChannelLayout batch_layout(const Tensor& x, const char* op, const char* name = "input") {
  if (x.dim() >= 2) return channel_layout(x, op, name);
  RK_REQUIRE(x.dim() == 1 && x.is_contiguous(), op, name, "a contiguous batch", x);
  return {1, 1, false};
}

// The layout of a batch (N, ...) that is dense with its samples outermost, as one channel of each.
inline ChannelLayout sample_layout(const Tensor& input, const char* op,
                                   const char* name = "input") {
  const int64_t numel = input.numel();
  const int64_t samples = input.dim() == 0 ? 0 : input.size(0);
  const bool outermost = samples < 2 || numel == 0 || input.stride(0) * samples == numel;
  RK_REQUIRE(input.dim() > 0 && is_dense(input) && outermost, op, name,
             "a batch, dense with its samples outermost", input);
  return {1, samples == 0 ? 1 : numel / samples, false};
}

// Whether the tensor has x's shape and strides; in a dimension of one element those say nothing.
inline bool has_layout_of(const Tensor& x, const Tensor& tensor) {
  const auto sizes = x.sizes(), of = tensor.sizes();
  const auto strides = x.strides(), own = tensor.strides();
  if (sizes.size() != of.size()) return false;
  const bool any = x.numel() != 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != of[d] || (any && sizes[d] > 1 && strides[d] != own[d])) return false;
  }
  return true;
}

// The data of a tensor that is x's like: its shape, storage order and dtype.
inline const void* data_like(const Call& call, const Tensor& x, const OptionalTensor& tensor,
                             const char* name) {
  if (!tensor) return nullptr;
  RK_REQUIRE(has_layout_of(x, *tensor) && tensor->scalar_type() == x.scalar_type(), call.op, name,
             words("like the input, ", described(x)), *tensor);
  return call.data(*tensor, name);
}

}  // namespace reg_kernels
