// A tensor table on a device, as its launchers read it: its contents are the kernels' alone.
#pragma once

#include "cuda.cuh"
#include "tensor_table.h"

namespace reg_kernels {
namespace cuda {

struct DeviceTable {
  TensorTable table;
  int64_t chunks;  // what its length leaves behind the rows
};

inline DeviceTable device_table(const Tensor& data, int64_t count, const char* op) {
  STD_TORCH_CHECK(data.is_cuda(), op, ": expected a table on a CUDA device");
  return {tensor_table(data, count, op), data.numel() - kRows * count};
}

// The counter of blocks in front of a table's partial sums: scratch, as _tensor_table.py keeps it.
inline double* scratch_of(const Tensor& data, const Tensor& scratch, int64_t chunks,
                          const char* op) {
  check_scratch(scratch, chunks, op);
  check_device(data, scratch, op, "scratch");
  return static_cast<double*>(scratch.mutable_data_ptr());
}

}  // namespace cuda
}  // namespace reg_kernels
