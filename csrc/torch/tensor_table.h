// A tensor table's arguments as both launchers, CPU and CUDA, read them, checked for what memory
// safety rests on.
#pragma once

#include "checks.h"
#include "reg_kernels/penalty_math.h"
#include "reg_kernels/tensor_table.h"

namespace reg_kernels {

// `data` as reg_kernels/_tensor_table.py builds it.
inline TensorTable tensor_table(const Tensor& data, int64_t count, const char* op) {
  STD_TORCH_CHECK(data.scalar_type() == ScalarType::Long && data.is_contiguous() &&
                      data.dim() == 1 && count >= 0 && data.numel() >= kRows * count,
                  op, ": expected a table of ", count, " tensors");
  return {static_cast<const int64_t*>(data.const_data_ptr()), count};
}

inline DType dtype_from(int64_t number, const char* op) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(DType::bfloat16), op,
                  ": unknown dtype ", number);
  return static_cast<DType>(number);
}

inline Penalty penalty_from(int64_t power, const char* op) {
  STD_TORCH_CHECK(power == 1 || power == 2, op, ": power must be 1 or 2, got ", power);
  return static_cast<Penalty>(power);
}

// Room for `chunks` partial sums behind the counter; on CUDA the table itself cannot be asked.
inline void check_scratch(const Tensor& scratch, int64_t chunks, const char* op) {
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::Double && scratch.is_contiguous() &&
                      scratch.numel() >= 1 + chunks,
                  op, ": expected float64 scratch for ", chunks, " chunks");
}

// Where one of several float64 numbers lies.
inline double* slot_of(const Tensor& numbers, int64_t slot, const char* op) {
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() &&
                      slot >= 0 && slot < numbers.numel(),
                  op, ": expected contiguous float64 with room for number ", slot);
  return static_cast<double*>(numbers.mutable_data_ptr()) + slot;
}

}  // namespace reg_kernels
