// BatchNorm's arguments as both launchers, CPU and CUDA, read them: what ops/batch_norm.py
// declares, checked for what memory safety rests on, as raw pointers.
#pragma once

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/batch_norm_math.h"

namespace reg_kernels {

using OptionalTensor = std::optional<Tensor>;

// An input (N, C, L) and what is done to it; tensors of the input's shape have its storage order.
struct BatchNormInput {
  DType dtype;
  ChannelLayout layout;
  int64_t numel;
  int64_t count;  // M = N L, values a channel
  const void* x;
  const void* residual;  // or null
  ChannelValues weight, bias;
  Activation activation;
  double slope;

  // [C] bits of M values each, rounded up to bytes: the size of a gate.
  int64_t gate_bytes() const { return layout.channels * ((count + 7) / 8); }
};

inline ChannelValues channel_values(const OptionalTensor& tensor, int64_t channels,
                                    const char* op) {
  if (!tensor) return {nullptr, DType::float32};
  STD_TORCH_CHECK(tensor->numel() == channels && tensor->is_contiguous(), op,
                  ": expected a contiguous tensor of one value a channel");
  return {const_cast<void*>(tensor->const_data_ptr()), dtype_of(*tensor, op)};
}

// The data of a tensor that is x's like: its shape, storage order and dtype.
inline const void* data_like(const Tensor& x, const OptionalTensor& tensor, const char* op) {
  if (!tensor) return nullptr;
  bool alike = tensor->dim() == x.dim() && tensor->scalar_type() == x.scalar_type();
  for (int64_t d = 0; alike && d < x.dim(); ++d) {
    alike = tensor->size(d) == x.size(d) &&
            (x.size(d) <= 1 || x.numel() == 0 || tensor->stride(d) == x.stride(d));
  }
  STD_TORCH_CHECK(alike, op, ": expected tensors of the input's shape, strides and dtype");
  return tensor->const_data_ptr();
}

inline BatchNormInput batch_norm_input(const Tensor& x, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& residual,
                                       int64_t activation, double slope, const char* op) {
  BatchNormInput in{};
  in.dtype = dtype_of(x, op);
  in.layout = channel_layout(x, op);
  in.numel = x.numel();
  in.count = in.layout.channels ? in.numel / in.layout.channels : 0;
  in.x = x.const_data_ptr();
  in.residual = data_like(x, residual, op);
  in.weight = channel_values(weight, in.layout.channels, op);
  in.bias = channel_values(bias, in.layout.channels, op);
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::gelu), op,
                  ": unknown activation ", activation);
  in.activation = static_cast<Activation>(activation);
  in.slope = slope;
  return in;
}

// What a training forward moves on, as the op is given it: [running_mean, running_var], and behind
// them, or by itself, num_batches_tracked.
struct Tracked {
  OptionalTensor running_mean, running_var, num_batches_tracked;

  Tracked(const std::vector<Tensor>& tensors, const char* op) {
    STD_TORCH_CHECK(tensors.size() <= 3, op, ": expected up to 3 tracked tensors, got ",
                    tensors.size());
    if (tensors.size() > 1) {
      running_mean = tensors[0];
      running_var = tensors[1];
    }
    if (tensors.size() % 2) num_batches_tracked = tensors.back();
  }
};

}  // namespace reg_kernels
