// Mixup's arguments as both launchers, CPU and CUDA, read them: what ops/mixup.py declares, checked
// for what memory safety rests on, as raw pointers.
#pragma once

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/mixup_math.h"

namespace reg_kernels {

using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the element type of a batch: a floating-point type, or bytes.
template <typename F>
void for_mixup_input(const Tensor& x, const char* op, const F& f) {
  if (x.scalar_type() == ScalarType::Byte) return f(uint8_t{});
  switch (dtype_of(x, op)) {
    case DType::float64: return f(double{});
    case DType::float32: return f(float{});
    case DType::float16: return f(float16{});
    case DType::bfloat16: return f(bfloat16{});
  }
}

// float64 where input or output is, else float32: what a batch is computed in.
inline bool computes_in_double(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == ScalarType::Double || y.scalar_type() == ScalarType::Double;
}

// The layout of a batch (N, C, ...); of (N,) or (N, C) the positions of a channel are 1.
inline ChannelLayout mixup_layout(const Tensor& x, const char* op) {
  if (x.dim() >= 2) return channel_layout(x, op);
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous(), op, ": expected a contiguous batch");
  return {1, 1, false};
}

// An uninitialised tensor of x's shape in another dtype, contiguous or with the channels last.
inline Tensor empty_batch(const Tensor& x, ScalarType dtype, bool channels_last) {
  std::vector<int64_t> strides(x.dim());
  int64_t expected = channels_last ? x.size(1) : 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (channels_last && d == 1) continue;
    strides[d] = expected;
    expected *= x.size(d);
  }
  if (channels_last) strides[1] = 1;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), x.sizes().data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      x.get_device_index(), &handle));
  return Tensor(handle);
}

inline const int64_t* int64_values(const OptionalTensor& tensor, int64_t count, const char* op,
                                   const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() &&
                      tensor->numel() == count,
                  op, ": ", name, " must be a contiguous int64 tensor of ", count);
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

// The blend of a batch like x: its shape alone is read.
inline MixupBlend mixup_blend(const Tensor& x, const OptionalTensor& lam, double one_lam,
                              const OptionalTensor& index, const OptionalTensor& boxes,
                              const char* op) {
  MixupBlend blend{};
  blend.samples = x.size(0);
  blend.height = x.dim() >= 2 ? x.size(x.dim() - 2) : 1;
  blend.width = x.size(x.dim() - 1);
  blend.one_lam_for_all = true;
  blend.one_lam = one_lam;
  if (lam) {
    STD_TORCH_CHECK(lam->is_contiguous() && (lam->numel() == 1 || lam->numel() == blend.samples),
                    op, ": lam must be a contiguous tensor of 1 or ", blend.samples);
    blend.lam = {const_cast<void*>(lam->const_data_ptr()), dtype_of(*lam, op)};
    blend.one_lam_for_all = lam->numel() == 1;
  }
  blend.index = int64_values(index, blend.samples, op, "index");
  if (boxes) {
    STD_TORCH_CHECK(x.dim() >= 4, op, ": boxes need images (N, C, ..., H, W)");
    blend.one_box = boxes->numel() == 4;
    blend.boxes = int64_values(boxes, blend.one_box ? 4 : 4 * blend.samples, op, "boxes");
  }
  return blend;
}

// The data of `values`, (C,) in the type that x and y are computed in; null where there are none.
inline const void* mixup_constants(const OptionalTensor& values, const Tensor& x, const Tensor& y,
                                   const char* op) {
  if (!values) return nullptr;
  const auto dtype = computes_in_double(x, y) ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(values->numel() == (x.dim() >= 2 ? x.size(1) : 1) && values->is_contiguous() &&
                      values->scalar_type() == dtype,
                  op, ": scale and shift must be contiguous, one for each channel");
  return values->const_data_ptr();
}

}  // namespace reg_kernels
