// Cross-entropy on the CUDA key: tensors to raw pointers. The kernels are in cross_entropy.cuh.
#include "cross_entropy.cuh"

#include <tuple>

#include "../torch/cross_entropy.h"
#include "../torch/cuda.cuh"

namespace reg_kernels {
namespace {

// The arguments as the kernels take them, with no place for a result yet.
template <typename T>
cuda::CrossEntropy<T> arguments(const LossInput& in) {
  cuda::CrossEntropy<T> a{};
  a.x = static_cast<const T*>(in.x);
  a.layout = in.layout;
  a.classes_last = in.classes_last;
  a.positions = in.positions;
  a.labels = in.labels;
  if (in.probabilities_dtype == in.dtype) {
    a.probabilities = static_cast<const T*>(in.probabilities);
  } else {
    a.probabilities_c = static_cast<const compute_t<T>*>(in.probabilities);
  }
  a.weight = static_cast<const compute_t<T>*>(in.weight);
  a.reduction = in.reduction;
  return a;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& partner,
                                                 const OptionalTensor& lam, double one_lam,
                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction,
                                                 const OptionalTensor& traced_smoothing,
                                                 bool keep_gradient) {
  const Call call("cross_entropy", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  const bool none = in.reduction == Reduction::none;
  const cuda::Launch launch(input);
  if (in.numel == 0) return loss_of_nothing(input, in.reduction, 2, keep_gradient);
  Tensor loss = empty_positions(input, none, 0);
  Tensor stats = empty_positions(input, true, 2);
  Tensor gradient =
      keep_gradient ? empty_like_dense(input) : empty_vector(input, 0, dtype_number(input));
  for_dtype(in.dtype, [&]<typename T>(T) {
    using C = compute_t<T>;
    auto a = arguments<T>(in);
    a.stats = static_cast<C*>(stats.mutable_data_ptr());
    (none ? a.losses : a.sum.loss) = static_cast<C*>(loss.mutable_data_ptr());
    if (keep_gradient) a.gradient = static_cast<T*>(gradient.mutable_data_ptr());
    OptionalTensor memory;
    cuda::launch_cross_entropy(a, cuda::allocator(input, memory), launch.stream);
  });
  return {loss, stats, gradient};
}

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                              const Tensor& target, const OptionalTensor& partner,
                              const OptionalTensor& lam, double one_lam,
                              const OptionalTensor& weight, int64_t ignore_index,
                              double label_smoothing, int64_t reduction,
                              const OptionalTensor& traced_smoothing) {
  const Call call("cross_entropy_backward", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  const LossSaved saved = loss_saved(call, in, grad_output, stats, 2);
  const bool none = in.reduction == Reduction::none;
  const cuda::Launch launch(input);
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  for_dtype(in.dtype, [&]<typename T>(T) {
    auto a = arguments<T>(in);
    a.stats = static_cast<compute_t<T>*>(const_cast<void*>(saved.stats));
    a.gradient = static_cast<T*>(gradient.mutable_data_ptr());
    a.grad_output = {const_cast<void*>(saved.grad_output), dtype_of(grad_output, call.op)};
    a.one_grad_output = !none;
    OptionalTensor memory;
    cuda::launch_cross_entropy_backward(a, cuda::allocator(input, memory), launch.stream);
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
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("rescale_", TORCH_BOX(&rescale_));
}

}  // namespace reg_kernels
