// Penalties, and the norm that clipping needs, on the CUDA key: tensors to raw pointers. The
// kernels are in penalty.cuh.
#include "penalty.cuh"

#include "../torch/cuda.cuh"
#include "../torch/tensor_table.h"

namespace reg_kernels {
namespace {

void penalty_table(const Tensor& data, int64_t count, int64_t seal, int64_t dtype, int64_t power,
                   const Tensor& sums, int64_t slot, const Tensor& scratch) {
  const Call call("penalty", data);
  const SealedTable sealed = sealed_table(call, data, count, seal);
  if (count) check_row(call, data, sealed, TableRow::grad);
  const int64_t chunks = table_chunks(data, count);
  const Penalty penalty = penalty_from(power, call.op);
  double* const partials = scratch_of(call, data, scratch, chunks);
  double* const sum = slot_of(call, sums, slot, "sums");
  const cuda::Launch launch(data);
  for_dtype(dtype_from(dtype, sealed.dtype, call.op), [&]<typename T>(T) {
    cuda::launch_penalty<T>(penalty, sealed.table, chunks, sum, partials, launch.stream);
  });
}

void penalty_backward_table(const Tensor& data, int64_t count, int64_t seal, int64_t dtype,
                            int64_t power, const Tensor& grad_output) {
  const Call call("penalty_backward", data);
  const SealedTable sealed = sealed_table(call, data, count, seal);
  const Penalty penalty = penalty_from(power, call.op);
  if (count) check_row(call, data, sealed, TableRow::grad);
  if (count) check_row(call, data, sealed, TableRow::param);
  const double* const grad = slot_of(call, grad_output, 0, "grad_output");
  const cuda::Launch launch(data);
  for_dtype(dtype_from(dtype, sealed.dtype, call.op), [&]<typename T>(T) {
    cuda::launch_penalty_backward<T>(penalty, sealed.table, table_chunks(data, count), grad,
                                     launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("penalty_table", TORCH_BOX(&penalty_table));
  m.impl("penalty_backward_table", TORCH_BOX(&penalty_backward_table));
}

}  // namespace reg_kernels
