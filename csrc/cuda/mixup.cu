// Mixup on the CUDA key: tensors to raw pointers. The kernels are in mixup.cuh.
#include "mixup.cuh"

#include "../torch/mixup.cuh"

namespace reg_kernels {
namespace {

Tensor mixup(const Tensor& input, const OptionalTensor& lam, double one_lam,
             const OptionalTensor& index, const OptionalTensor& boxes, const OptionalTensor& scale,
             const OptionalTensor& shift, ScalarType dtype, bool channels_last) {
  const char* op = "mixup";
  const MixupBlend blend = cuda::device_blend(input, lam, one_lam, index, boxes, op);
  const ChannelLayout layout = mixup_layout(input, op);
  Tensor output = empty_batch(input, dtype, channels_last);
  const void* const scales = cuda::device_constants(scale, input, output, op);
  const void* const shifts = cuda::device_constants(shift, input, output, op);
  const cuda::Launch launch(input);
  for_mixup_input(input, op, [&]<typename In>(In) {
    cuda::for_dtype(output, op, [&]<typename Out>(Out) {
      cuda::launch_mixup(static_cast<const In*>(input.const_data_ptr()),
                         static_cast<Out*>(output.mutable_data_ptr()), blend, layout, channels_last,
                         scales, shifts, launch.stream);
    });
  });
  return output;
}

void mixup_(const Tensor& input, const OptionalTensor& lam, double one_lam,
            const OptionalTensor& index, const OptionalTensor& boxes, const OptionalTensor& scale,
            const OptionalTensor& shift) {
  const char* op = "mixup_";
  const MixupBlend blend = cuda::device_blend(input, lam, one_lam, index, boxes, op);
  const ChannelLayout layout = mixup_layout(input, op);
  const void* const scales = cuda::device_constants(scale, input, input, op);
  const void* const shifts = cuda::device_constants(shift, input, input, op);
  const cuda::Launch launch(input);
  cuda::for_dtype(input, op, [&]<typename T>(T) {
    cuda::launch_mixup_in_place(static_cast<T*>(input.mutable_data_ptr()), blend, layout, scales,
                                shifts, launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("mixup", TORCH_BOX(&mixup));
  m.impl("mixup_", TORCH_BOX(&mixup_));
}

}  // namespace reg_kernels
