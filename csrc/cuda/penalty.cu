// Penalties, and the norm that clipping needs, on the CUDA key: tensors to raw pointers. The
// kernels are in penalty.cuh.
#include "penalty.cuh"

#include "../torch/tensor_table.cuh"

namespace reg_kernels {
namespace {

void penalty_table(const Tensor& data, int64_t count, int64_t dtype, int64_t power,
                   const Tensor& sums, int64_t slot, const Tensor& scratch) {
  const cuda::DeviceTable of = cuda::device_table(data, count, "penalty");
  const Penalty penalty = penalty_from(power, "penalty");
  cuda::check_device(data, sums, "penalty", "sums");
  double* const sum = slot_of(sums, slot, "penalty");
  double* const partials = cuda::scratch_of(data, scratch, of.chunks, "penalty");
  const cuda::Launch launch(data);
  cuda::for_dtype(dtype_from(dtype, "penalty"), [&]<typename T>(T) {
    cuda::launch_penalty<T>(penalty, of.table, of.chunks, sum, partials, launch.stream);
  });
}

void penalty_backward_table(const Tensor& data, int64_t count, int64_t dtype, int64_t power,
                            const Tensor& grad_output) {
  const cuda::DeviceTable of = cuda::device_table(data, count, "penalty_backward");
  const Penalty penalty = penalty_from(power, "penalty_backward");
  cuda::check_device(data, grad_output, "penalty_backward", "grad_output");
  const double* const grad = slot_of(grad_output, 0, "penalty_backward");
  const cuda::Launch launch(data);
  cuda::for_dtype(dtype_from(dtype, "penalty_backward"), [&]<typename T>(T) {
    cuda::launch_penalty_backward<T>(penalty, of.table, of.chunks, grad, launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("penalty_table", TORCH_BOX(&penalty_table));
  m.impl("penalty_backward_table", TORCH_BOX(&penalty_backward_table));
}

}  // namespace reg_kernels
