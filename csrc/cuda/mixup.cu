// Mixup on the CUDA key: tensors to raw pointers. The kernels are in mixup.cuh.
#include "mixup.cuh"

#include "../torch/cuda.cuh"
#include "../torch/mixup.h"

namespace reg_kernels {
namespace {

Tensor mixup(const Tensor& input, const OptionalTensor& lam, double one_lam,
             const OptionalTensor& index, const OptionalTensor& boxes, const OptionalTensor& scale,
             const OptionalTensor& shift, ScalarType dtype, bool channels_last) {
  const Call call("mixup", input);
  const ChannelLayout layout = batch_layout(input, call.op);
  const MixupBlend blend = mixup_blend(call, input, lam, one_lam, index, boxes);
  Tensor output = empty_batch(input, dtype, channels_last, call.op);
  const void* const scales = mixup_constants(call, scale, input, output, "scale");
  const void* const shifts = mixup_constants(call, shift, input, output, "shift");
  const cuda::Launch launch(input);
  for_mixup_input(input, call.op, [&]<typename In>(In) {
    for_dtype(output, call.op, [&]<typename Out>(Out) {
      cuda::launch_mixup(static_cast<const In*>(call.data(input, "input")),
                         static_cast<Out*>(output.mutable_data_ptr()), blend, layout, channels_last,
                         scales, shifts, launch.stream);
    });
  });
  return output;
}

void mixup_(const Tensor& input, const OptionalTensor& lam, double one_lam,
            const OptionalTensor& index, const OptionalTensor& boxes, const OptionalTensor& scale,
            const OptionalTensor& shift) {
  const Call call("mixup_", input);
  const ChannelLayout layout = batch_layout(input, call.op);
  const MixupBlend blend = mixup_blend(call, input, lam, one_lam, index, boxes);
  const void* const scales = mixup_constants(call, scale, input, input, "scale");
  const void* const shifts = mixup_constants(call, shift, input, input, "shift");
  check_apart_from_input(call.op, input, lam, index, boxes, scale, shift);
  const cuda::Launch launch(input);
  for_dtype(input, call.op, [&]<typename T>(T) {
    cuda::launch_mixup_in_place(static_cast<T*>(call.written(input, "input")), blend, layout,
                                scales, shifts, launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("mixup", TORCH_BOX(&mixup));
  m.impl("mixup_", TORCH_BOX(&mixup_));
}

}  // namespace reg_kernels
