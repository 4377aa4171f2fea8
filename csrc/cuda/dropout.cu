// Dropout on the CUDA key: tensors to raw pointers. The kernels are in dropout.cuh.
#include "dropout.cuh"

#include "../torch/cuda.cuh"
#include "../torch/channel_layout.h"

namespace reg_kernels {
namespace {

cuda::RateArgument rate_argument(const Tensor& x, double p, const std::optional<Tensor>& traced_p) {
  if (!traced_p) return DropoutRate::from_probability(p);
  check_probability(*traced_p, "dropout");
  const auto* value = static_cast<const double*>(traced_p->const_data_ptr());
  if (traced_p->is_cpu()) return DropoutRate::from_probability(*value);
  STD_TORCH_CHECK(traced_p->get_device_index() == x.get_device_index(),
                  "dropout: traced_p must be on the CPU or on the input's device");
  return cuda::RateArgument(value);
}

void run(const Tensor& x, const Tensor& y, double p, const Tensor& rng_state,
         int64_t element_offset, const std::optional<Tensor>& traced_p) {
  check_element_offset(element_offset, "dropout");
  const cuda::Launch launch(x);
  const cuda::RngState rng = cuda::read_rng_state(x, rng_state, "dropout");
  const cuda::RateArgument rate = rate_argument(x, p, traced_p);
  cuda::for_dtype(x, "dropout", [&]<typename T>(T) {
    cuda::launch_dropout(static_cast<const T*>(x.const_data_ptr()),
                         static_cast<T*>(y.mutable_data_ptr()), x.numel(), element_offset, rate,
                         rng, launch.stream);
  });
}

void run_feature(const Tensor& x, const Tensor& y, double p, const Tensor& rng_state,
                 int64_t element_offset, const std::optional<Tensor>& traced_p) {
  check_element_offset(element_offset, "feature_dropout");
  const cuda::Launch launch(x);
  const cuda::RngState rng = cuda::read_rng_state(x, rng_state, "feature_dropout");
  const cuda::RateArgument rate = rate_argument(x, p, traced_p);
  const ChannelLayout layout = channel_layout(x, "feature_dropout");
  cuda::for_dtype(x, "feature_dropout", [&]<typename T>(T) {
    cuda::launch_feature_dropout(static_cast<const T*>(x.const_data_ptr()),
                                 static_cast<T*>(y.mutable_data_ptr()), x.numel(), layout,
                                 element_offset, rate, rng, launch.stream);
  });
}

Tensor dropout(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
               const std::optional<Tensor>& traced_p) {
  const Tensor x = dense(input);
  Tensor y = empty_like_dense(x);
  run(x, y, p, rng_state, element_offset, traced_p);
  return y;
}

void dropout_(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
              const std::optional<Tensor>& traced_p) {
  check_dense(input, "dropout_");
  run(input, input, p, rng_state, element_offset, traced_p);
}

Tensor feature_dropout(const Tensor& input, double p, const Tensor& rng_state,
                       int64_t element_offset, const std::optional<Tensor>& traced_p) {
  Tensor y = empty_like_dense(input);
  run_feature(input, y, p, rng_state, element_offset, traced_p);
  return y;
}

void feature_dropout_(const Tensor& input, double p, const Tensor& rng_state,
                      int64_t element_offset, const std::optional<Tensor>& traced_p) {
  run_feature(input, input, p, rng_state, element_offset, traced_p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_", TORCH_BOX(&dropout_));
  m.impl("feature_dropout", TORCH_BOX(&feature_dropout));
  m.impl("feature_dropout_", TORCH_BOX(&feature_dropout_));
}

}  // namespace reg_kernels
