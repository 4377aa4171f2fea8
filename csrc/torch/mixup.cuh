// What mixup's CUDA launchers read of tensors.
#pragma once

#include "cuda.cuh"
#include "mixup.h"

namespace reg_kernels {
namespace cuda {

// `tensor`, if there is one, as what a kernel on x's device may read.
inline const OptionalTensor& on_device_of(const Tensor& x, const OptionalTensor& tensor,
                                          const char* op, const char* name) {
  if (tensor) check_device(x, *tensor, op, name);
  return tensor;
}

inline MixupBlend device_blend(const Tensor& x, const OptionalTensor& lam, double one_lam,
                               const OptionalTensor& index, const OptionalTensor& boxes,
                               const char* op) {
  return mixup_blend(x, on_device_of(x, lam, op, "lam"), one_lam,
                     on_device_of(x, index, op, "index"), on_device_of(x, boxes, op, "boxes"), op);
}

inline const void* device_constants(const OptionalTensor& values, const Tensor& x, const Tensor& y,
                                    const char* op) {
  return mixup_constants(on_device_of(x, values, op, "scale and shift"), x, y, op);
}

}  // namespace cuda
}  // namespace reg_kernels
