// Knowledge distillation on the CUDA key: tensors to raw pointers. The kernels are in
// distillation.cuh.
#include "distillation.cuh"

#include <type_traits>

#include "../torch/loss.cuh"

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

// `softness`: null, or temperature and alpha on the device.
template <typename S, typename T>
cuda::DistillationArguments<S, T> arguments(const LossInput& in, const void* teacher,
                                            double temperature, double alpha,
                                            const double* softness) {
  auto a = cuda::loss_arguments<cuda::DistillationArguments<S, T>>(in);
  a.teacher = static_cast<const T*>(teacher);
  a.temperature = temperature;
  a.alpha = alpha;
  a.traced = softness;
  return a;
}

LossResult distillation(const Tensor& input, const Tensor& teacher, const OptionalTensor& target,
                        const OptionalTensor& partner, const OptionalTensor& lam, double one_lam,
                        const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                        int64_t reduction, const OptionalTensor& traced_smoothing,
                        double temperature, double alpha, const OptionalTensor& traced_softness,
                        bool keep_gradient) {
  const Call call("distillation", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  const void* teacher_values = teacher_data(call, in, input, teacher);
  const double* softness = traced_numbers(call, traced_softness, 2, "traced_softness");
  const cuda::Launch launch(input);
  LossTensors results(input, in.reduction, 5, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  for_dtypes(in, teacher, call.op, [&]<typename S, typename T>(S, T) {
    auto a = arguments<S, T>(in, teacher_values, temperature, alpha, softness);
    cuda::set_results(a, results);
    OptionalTensor memory;
    cuda::launch_distillation(a, cuda::allocator(input, memory), launch.stream);
  });
  return results.result();
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
  const cuda::Launch launch(input);
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  for_dtypes(in, teacher, call.op, [&]<typename S, typename T>(S, T) {
    auto a = arguments<S, T>(in, teacher_values, temperature, alpha, softness);
    cuda::set_backward(a, saved, gradient);
    OptionalTensor memory;
    cuda::launch_distillation_backward(a, cuda::allocator(input, memory), launch.stream);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("distillation", TORCH_BOX(&distillation));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace reg_kernels
