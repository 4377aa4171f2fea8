// Mixup's gradient on the CUDA key. Apart from mixup.cu so that the two compile side by side.
#include "mixup.cuh"

#include "../torch/cuda.cuh"
#include "../torch/mixup.h"

namespace reg_kernels {
namespace {

Tensor mixup_backward(const Tensor& grad_output, const OptionalTensor& lam, double one_lam,
                      const OptionalTensor& receivers, const OptionalTensor& starts,
                      const OptionalTensor& boxes, const OptionalTensor& scale, ScalarType dtype,
                      bool channels_last) {
  const Call call("mixup_backward", grad_output);
  const ChannelLayout layout = batch_layout(grad_output, call.op, "grad_output");
  const MixupBlend blend = mixup_blend(call, grad_output, lam, one_lam, std::nullopt, boxes);
  const MixupReceivers sorted = mixup_receivers(call, blend, receivers, starts);
  Tensor grad_input = empty_batch(grad_output, dtype, channels_last, call.op);
  const void* const scales = mixup_constants(call, scale, grad_output, grad_input, "scale");
  const cuda::Launch launch(grad_output);
  for_dtype(grad_output, call.op, [&]<typename In>(In) {
    for_dtype(grad_input, call.op, [&]<typename Out>(Out) {
      cuda::launch_mixup_backward(static_cast<const In*>(call.data(grad_output, "grad_output")),
                                  static_cast<Out*>(grad_input.mutable_data_ptr()), blend,
                                  sorted.samples, sorted.starts, layout, channels_last, scales,
                                  launch.stream);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("mixup_backward", TORCH_BOX(&mixup_backward));
}

}  // namespace reg_kernels
