// Knowledge distillation on the CUDA key: tensors to raw pointers. The kernels are in
// distillation.cuh.
#include "distillation.cuh"

#include <tuple>

#include "../torch/cross_entropy.h"
#include "../torch/cuda.cuh"

namespace reg_kernels {
namespace {

// Calls f with a value of the teacher's type: of those that a student of type S may have.
template <typename S, typename F>
void for_teacher(const Tensor& teacher, const char* op, F&& f) {
  const DType dtype = dtype_of(teacher, op, "teacher");
  if constexpr (std::is_same_v<S, double>) {
    f(double{});
  } else if (dtype == DType::float32) {
    f(float{});
  } else if (dtype == DType::float16) {
    f(float16{});
  } else {
    f(bfloat16{});
  }
}

// Calls f with a value of each of the two element types.
template <typename F>
void for_dtypes(const LossInput& in, const Tensor& teacher, const char* op, F&& f) {
  for_dtype(in.dtype, [&]<typename S>(S student) {
    for_teacher<S>(teacher, op, [&]<typename T>(T of_teacher) { f(student, of_teacher); });
  });
}

// As the kernels take them, with no place for a result yet.
template <typename S, typename T>
cuda::DistillationArguments<S, T> arguments(const LossInput& in, const void* teacher) {
  cuda::DistillationArguments<S, T> a{};
  a.x = static_cast<const S*>(in.x);
  a.teacher = static_cast<const T*>(teacher);
  a.positions = in.positions;
  a.labels = in.labels;
  a.weight = static_cast<const compute_t<S>*>(in.weight);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> distillation(
    const Tensor& input, const Tensor& teacher, const OptionalTensor& target,
    const OptionalTensor& partner, const OptionalTensor& lam, double one_lam,
    const OptionalTensor& weight, int64_t ignore_index, double label_smoothing, int64_t reduction,
    const OptionalTensor& traced_smoothing, double temperature, double alpha,
    const OptionalTensor& traced_softness, bool keep_gradient) {
  const Call call("distillation", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  const void* teacher_values = teacher_data(call, in, input, teacher);
  const double* softness = traced_numbers(call, traced_softness, 2, "traced_softness");
  const bool none = in.reduction == Reduction::none;
  const cuda::DistillationOptions options{in.classes_last, in.reduction, temperature, alpha,
                                          softness};
  const cuda::Launch launch(input);
  if (in.numel == 0) return loss_of_nothing(input, in.reduction, 5, keep_gradient);
  Tensor loss = empty_positions(input, none, 0);
  Tensor stats = empty_positions(input, true, 5);
  Tensor gradient =
      keep_gradient ? empty_like_dense(input) : empty_vector(input, 0, dtype_number(input));
  for_dtypes(in, teacher, call.op, [&]<typename S, typename T>(S, T) {
    using C = compute_t<S>;
    auto a = arguments<S, T>(in, teacher_values);
    a.stats = static_cast<C*>(stats.mutable_data_ptr());
    (none ? a.losses : a.sum.loss) = static_cast<C*>(loss.mutable_data_ptr());
    if (keep_gradient) a.gradient = static_cast<S*>(gradient.mutable_data_ptr());
    OptionalTensor memory;
    cuda::launch_distillation(a, options, cuda::allocator(input, memory), launch.stream);
  });
  return {loss, stats, gradient};
}

Tensor distillation_backward(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                             const Tensor& teacher, const OptionalTensor& target,
                             const OptionalTensor& partner, const OptionalTensor& lam,
                             double one_lam, const OptionalTensor& weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction,
                             const OptionalTensor& traced_smoothing, double temperature,
                             double alpha, const OptionalTensor& traced_softness) {
  const Call call("distillation_backward", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  const void* teacher_values = teacher_data(call, in, input, teacher);
  const double* softness = traced_numbers(call, traced_softness, 2, "traced_softness");
  const LossSaved saved = loss_saved(call, in, grad_output, stats, 5);
  const cuda::DistillationOptions options{in.classes_last, in.reduction, temperature, alpha,
                                          softness};
  const cuda::Launch launch(input);
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  for_dtypes(in, teacher, call.op, [&]<typename S, typename T>(S, T) {
    auto a = arguments<S, T>(in, teacher_values);
    a.stats = static_cast<compute_t<S>*>(const_cast<void*>(saved.stats));
    a.grad_output = {const_cast<void*>(saved.grad_output), dtype_of(grad_output, call.op)};
    a.one_grad_output = in.reduction != Reduction::none;
    a.gradient = static_cast<S*>(gradient.mutable_data_ptr());
    OptionalTensor memory;
    cuda::launch_distillation_backward(a, options, cuda::allocator(input, memory), launch.stream);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("distillation", TORCH_BOX(&distillation));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace reg_kernels
