// Dropout on the CUDA key: tensors to raw pointers. The kernels are in dropout.cuh.
#include "dropout.cuh"

#include "../torch/cuda.cuh"
#include "../torch/channel_layout.h"

namespace reg_kernels {
namespace {

cuda::RateArgument rate_argument(const Call& call, double p, const OptionalTensor& traced_p) {
  check_probability(p, call.op);
  if (!traced_p) return DropoutRate::from_probability(p);
  const double* value = traced_p_data(call, *traced_p);
  if (traced_p->is_cpu()) return DropoutRate::from_probability(*value);
  return cuda::RateArgument(value);
}

void run(const Call& call, const Tensor& x, const Tensor& y, double p, const Tensor& rng_state,
         int64_t element_offset, const OptionalTensor& traced_p) {
  check_element_offset(element_offset, call.op);
  const cuda::Launch launch(x);
  const cuda::RngState rng = cuda::read_rng_state(call, rng_state);
  const cuda::RateArgument rate = rate_argument(call, p, traced_p);
  cuda::for_dtype(x, call.op, [&]<typename T>(T) {
    T* const to = static_cast<T*>(call.written(y, "input"));
    cuda::launch_dropout(static_cast<const T*>(call.data(x, "input")), to, x.numel(),
                         element_offset, rate, rng, launch.stream);
  });
}

void run_feature(const Call& call, const Tensor& x, const Tensor& y, double p,
                 const Tensor& rng_state, int64_t element_offset, const OptionalTensor& traced_p) {
  check_element_offset(element_offset, call.op);
  const ChannelLayout layout = channel_layout(x, call.op);
  const cuda::Launch launch(x);
  const cuda::RngState rng = cuda::read_rng_state(call, rng_state);
  const cuda::RateArgument rate = rate_argument(call, p, traced_p);
  cuda::for_dtype(x, call.op, [&]<typename T>(T) {
    T* const to = static_cast<T*>(call.written(y, "input"));
    cuda::launch_feature_dropout(static_cast<const T*>(call.data(x, "input")), to, x.numel(),
                                 layout, element_offset, rate, rng, launch.stream);
  });
}

Tensor dropout(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
               const OptionalTensor& traced_p) {
  const Call call("dropout", input);
  const Tensor x = dense(call, input);
  Tensor y = empty_like_dense(x);
  run(call, x, y, p, rng_state, element_offset, traced_p);
  return y;
}

void dropout_(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
              const OptionalTensor& traced_p) {
  const Call call("dropout_", input);
  check_dense(input, call.op, "input");
  run(call, input, input, p, rng_state, element_offset, traced_p);
}

Tensor feature_dropout(const Tensor& input, double p, const Tensor& rng_state,
                       int64_t element_offset, const OptionalTensor& traced_p) {
  const Call call("feature_dropout", input);
  channel_layout(input, call.op);
  Tensor y = empty_like_dense(input);
  run_feature(call, input, y, p, rng_state, element_offset, traced_p);
  return y;
}

void feature_dropout_(const Tensor& input, double p, const Tensor& rng_state,
                      int64_t element_offset, const OptionalTensor& traced_p) {
  const Call call("feature_dropout_", input);
  run_feature(call, input, input, p, rng_state, element_offset, traced_p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_", TORCH_BOX(&dropout_));
  m.impl("feature_dropout", TORCH_BOX(&feature_dropout));
  m.impl("feature_dropout_", TORCH_BOX(&feature_dropout_));
}

}  // namespace reg_kernels
