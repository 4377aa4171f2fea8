// What the launchers share of LibTorch's stable ABI. Python has validated the arguments once
// (reg_kernels/ops/); what is checked here is what a kernel's memory safety rests on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "reg_kernels/dtypes.h"

namespace reg_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, op, ": expected floating-point values of 16 to 64 bits");
  }
}

// Whether the elements fill one stretch of memory, each place once, in whatever order of
// dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (sizes[d] > 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// `input` itself where it is dense, otherwise a contiguous copy: storage order is then defined.
inline Tensor dense(const Tensor& input) {
  return is_dense(input) ? input : torch::stable::contiguous(input);
}

// An uninitialised tensor of x's shape, strides, dtype and device. Straight from the allocator: the
// stable ABI's empty_like looks its operator up by name at each call, which a small one would feel.
inline Tensor empty_like_dense(const Tensor& x) {
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(),
                                                  dtype, device_type, x.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

// An uninitialised [count] on x's device; `dtype` is one of aoti_torch_dtype_...().
inline Tensor empty_vector(const Tensor& x, int64_t count, int32_t dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, dtype, device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// The number that torch's C interface knows a tensor's dtype by.
inline int32_t dtype_number(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline void check_dense(const Tensor& tensor, const char* op) {
  STD_TORCH_CHECK(is_dense(tensor), op, ": expected a dense tensor to write into");
}

// A probability that a compiled program passes as a tensor.
inline void check_probability(const Tensor& p, const char* op) {
  STD_TORCH_CHECK(p.scalar_type() == ScalarType::Double && p.numel() == 1, op,
                  ": a traced p must be one float64");
}

// The offset that shards a mask: added to an index, it has to stay an int64.
inline void check_element_offset(int64_t element_offset, const char* op) {
  STD_TORCH_CHECK(element_offset >= 0 && element_offset < int64_t{1} << 62, op,
                  ": element_offset must be in [0, 2^62), got ", element_offset);
}

inline void check_rng_state(const Tensor& rng_state, const char* op) {
  STD_TORCH_CHECK(rng_state.scalar_type() == ScalarType::Long && rng_state.numel() == 2 &&
                      rng_state.is_contiguous(),
                  op, ": rng_state must be a contiguous int64 tensor [seed, offset]");
}

}  // namespace reg_kernels
