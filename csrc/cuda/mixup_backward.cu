// Mixup's gradient on the CUDA key. Apart from mixup.cu so that the two compile side by side.
#include "mixup.cuh"

#include "../torch/mixup.cuh"

namespace reg_kernels {
namespace {

Tensor mixup_backward(const Tensor& grad_output, const OptionalTensor& lam, double one_lam,
                      const OptionalTensor& receivers, const OptionalTensor& starts,
                      const OptionalTensor& boxes, const OptionalTensor& scale, ScalarType dtype,
                      bool channels_last) {
  const char* op = "mixup_backward";
  const MixupBlend blend = cuda::device_blend(grad_output, lam, one_lam, std::nullopt, boxes, op);
  const ChannelLayout layout = mixup_layout(grad_output, op);
  const int64_t* const by_partner = int64_values(
      cuda::on_device_of(grad_output, receivers, op, "receivers"), blend.samples, op, "receivers");
  const int64_t* const first = int64_values(cuda::on_device_of(grad_output, starts, op, "starts"),
                                            blend.samples + 1, op, "starts");
  STD_TORCH_CHECK(!by_partner == !first, op, ": receivers come with starts");
  Tensor grad_input = empty_batch(grad_output, dtype, channels_last);
  const void* const scales = cuda::device_constants(scale, grad_output, grad_input, op);
  const cuda::Launch launch(grad_output);
  cuda::for_dtype(grad_output, op, [&]<typename In>(In) {
    cuda::for_dtype(grad_input, op, [&]<typename Out>(Out) {
      cuda::launch_mixup_backward(static_cast<const In*>(grad_output.const_data_ptr()),
                                  static_cast<Out*>(grad_input.mutable_data_ptr()), blend,
                                  by_partner, first, layout, channels_last, scales, launch.stream);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("mixup_backward", TORCH_BOX(&mixup_backward));
}

}  // namespace reg_kernels
