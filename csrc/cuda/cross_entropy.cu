// Cross-entropy on the CUDA key: tensors to raw pointers. The kernels are in cross_entropy.cuh.
#include "cross_entropy.cuh"

#include "../torch/loss.cuh"

namespace reg_kernels {
namespace {

template <typename T>
cuda::CrossEntropy<T> arguments(const LossInput& in) {
  auto a = cuda::loss_arguments<cuda::CrossEntropy<T>>(in);
  if (in.probabilities_dtype == in.dtype) {
    a.probabilities = static_cast<const T*>(in.probabilities);
  } else {
    a.probabilities_c = static_cast<const compute_t<T>*>(in.probabilities);
  }
  return a;
}

LossResult cross_entropy(const Tensor& input, const LossTarget& target, bool keep_gradient) {
  const Call call("cross_entropy", input);
  const LossInput in = loss_input(call, input, target);
  const cuda::Launch launch(input);
  LossTensors results(input, in.reduction, 2, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  for_dtype(in.dtype, [&]<typename T>(T) {
    auto a = arguments<T>(in);
    cuda::set_results(a, results);
    OptionalTensor memory;
    cuda::launch_cross_entropy(a, cuda::allocator(input, memory), launch.stream);
  });
  return results.result();
}

Tensor cross_entropy_backward(const LossBackward& of, const LossTarget& target) {
  const Call call("cross_entropy_backward", of.input);
  const LossInput in = loss_input(call, of.input, target);
  const LossSaved saved = loss_saved(call, in, of, 2);
  const cuda::Launch launch(of.input);
  Tensor gradient = empty_like_dense(of.input);
  if (in.numel == 0) return gradient;
  for_dtype(in.dtype, [&]<typename T>(T) {
    auto a = arguments<T>(in);
    cuda::set_backward(a, saved, gradient);
    OptionalTensor memory;
    cuda::launch_cross_entropy_backward(a, cuda::allocator(of.input, memory), launch.stream);
  });
  return gradient;
}

// x *= factor in place.
void rescale_(const Tensor& x, const Tensor& factor) {
  const Call call("rescale_", x);
  check_dense(x, call.op, "x");
  RK_REQUIRE(factor.numel() == 1, call.op, "factor", "one number", factor);
  const DType dtype = dtype_of(factor, call.op, "factor");
  const ChannelValues by{const_cast<void*>(call.data(factor, "factor")), dtype};
  const cuda::Launch launch(x);
  for_dtype(x, call.op, [&]<typename T>(T) {
    cuda::launch_rescale(static_cast<T*>(call.written(x, "x")), x.numel(), by, launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy_op<cross_entropy>));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_op<cross_entropy_backward>));
  m.impl("rescale_", TORCH_BOX(&rescale_));
}

}  // namespace reg_kernels
