// Augmentation on the CUDA key: tensors to raw pointers. The kernels are in augment.cuh.
#include "augment.cuh"

#include "../torch/augment.h"
#include "../torch/cuda.cuh"

namespace reg_kernels {
namespace {

Tensor augment(const Tensor& pixels, const Tensor& images, const Tensor& program, int64_t channels,
               bool channels_last, int64_t height, int64_t width, ScalarType dtype,
               bool result_channels_last, bool exact) {
  const Call call("augment", pixels);
  AugmentBatch batch = augment_batch(call, pixels, images, program, channels, channels_last, height,
                                     width, dtype, result_channels_last, exact);
  Tensor result = augment_result(call, pixels, batch, dtype);
  batch.result = result.mutable_data_ptr();
  const cuda::Launch launch(pixels);
  std::optional<Tensor> memory;
  cuda::launch_augment(batch, cuda::allocator(pixels, memory), launch.stream);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) { m.impl("augment", TORCH_BOX(&augment)); }

}  // namespace reg_kernels
