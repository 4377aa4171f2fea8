// Knowledge distillation on the CUDA key: tensors to raw pointers. The kernels are in
// distillation.cuh.
#include "distillation.cuh"

#include <tuple>

#include "../torch/cross_entropy.cuh"

namespace reg_kernels {
namespace {

// Calls f with a value of the teacher's type: of those that a student of type S may have.
template <typename S, typename F>
void for_teacher(const Tensor& teacher, const char* op, F&& f) {
  const DType dtype = dtype_of(teacher, op);
  STD_TORCH_CHECK((std::is_same_v<S, double>) == (dtype == DType::float64), op,
                  ": teacher and input must both be float64, or neither");
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
  cuda::for_dtype(in.dtype, [&]<typename S>(S student) {
    for_teacher<S>(teacher, op, [&]<typename T>(T of_teacher) { f(student, of_teacher); });
  });
}

// Arguments that are checked, and the teacher among them.
LossInput distillation_input(const Tensor& input, const Tensor& teacher,
                             const OptionalTensor& target, const OptionalTensor& partner,
                             const OptionalTensor& lam, double one_lam,
                             const OptionalTensor& weight, int64_t ignore_index, double smoothing,
                             int64_t reduction, const OptionalTensor& traced_smoothing,
                             const char* op) {
  const LossInput in =
      cuda::device_loss_input(input, target, partner, lam, one_lam, weight, ignore_index, smoothing,
                              reduction, traced_smoothing, op);
  STD_TORCH_CHECK(!in.probabilities, op, ": labels must be class indices");
  STD_TORCH_CHECK(has_layout_of(input, teacher), op,
                  ": teacher must have the input's shape and strides");
  cuda::check_device(input, teacher, op, "teacher");
  return in;
}

// As the kernels take them, with no place for a result yet.
template <typename S, typename T>
cuda::DistillationArguments<S, T> arguments(const LossInput& in, const Tensor& teacher) {
  cuda::DistillationArguments<S, T> a{};
  a.x = static_cast<const S*>(in.x);
  a.teacher = static_cast<const T*>(teacher.const_data_ptr());
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
  const char* op = "distillation";
  const LossInput in =
      distillation_input(input, teacher, target, partner, lam, one_lam, weight, ignore_index,
                         label_smoothing, reduction, traced_smoothing, op);
  const bool none = in.reduction == Reduction::none;
  if (traced_softness) cuda::check_device(input, *traced_softness, op, "traced_softness");
  const cuda::DistillationOptions options{in.classes_last, in.reduction, temperature, alpha,
                                          traced_numbers(traced_softness, 2, op)};
  const cuda::Launch launch(input);
  if (in.numel == 0) return loss_of_nothing(input, in.reduction, 5, keep_gradient);
  Tensor loss = empty_positions(input, none, 0);
  Tensor stats = empty_positions(input, true, 5);
  Tensor gradient =
      keep_gradient ? empty_like_dense(input) : empty_vector(input, 0, dtype_number(input));
  for_dtypes(in, teacher, op, [&]<typename S, typename T>(S, T) {
    using C = compute_t<S>;
    auto a = arguments<S, T>(in, teacher);
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
  const char* op = "distillation_backward";
  const LossInput in =
      distillation_input(input, teacher, target, partner, lam, one_lam, weight, ignore_index,
                         label_smoothing, reduction, traced_smoothing, op);
  cuda::check_backward(input, in, grad_output, stats, 5, op);
  if (traced_softness) cuda::check_device(input, *traced_softness, op, "traced_softness");
  const cuda::DistillationOptions options{in.classes_last, in.reduction, temperature, alpha,
                                          traced_numbers(traced_softness, 2, op)};
  const cuda::Launch launch(input);
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  for_dtypes(in, teacher, op, [&]<typename S, typename T>(S, T) {
    auto a = arguments<S, T>(in, teacher);
    a.stats = static_cast<compute_t<S>*>(const_cast<void*>(stats.const_data_ptr()));
    a.grad_output = {const_cast<void*>(grad_output.const_data_ptr()), dtype_of(grad_output, op)};
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
