// Knowledge distillation on the CUDA key: tensors to raw pointers. The kernels are in
// distillation.cuh.
#include "distillation.cuh"

#include <type_traits>

#include "../torch/loss.cuh"

namespace reg_kernels {
namespace {

// Calls f with a value of the teacher's type: of those that a student of type S may have.
template <typename S, typename F>
void for_teacher(DType dtype, F&& f) {
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
void for_dtypes(const LossInput& in, const TeacherInput& by, F&& f) {
  for_dtype(in.dtype, [&]<typename S>(S student) {
    for_teacher<S>(by.dtype, [&]<typename T>(T of_teacher) { f(student, of_teacher); });
  });
}

template <typename S, typename T>
cuda::DistillationArguments<S, T> arguments(const LossInput& in, const TeacherInput& by) {
  auto a = cuda::loss_arguments<cuda::DistillationArguments<S, T>>(in);
  a.teacher = static_cast<const T*>(by.logits);
  a.temperature = by.temperature;
  a.alpha = by.alpha;
  a.traced = by.traced_softness;
  return a;
}

LossResult distillation(const Tensor& input, const Teacher& teacher, const LossTarget& target,
                        bool keep_gradient) {
  const Call call("distillation", input);
  const LossInput in = loss_input(call, input, target);
  const TeacherInput by = teacher_input(call, in, input, teacher);
  const cuda::Launch launch(input);
  LossTensors results(input, in.reduction, 5, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  for_dtypes(in, by, [&]<typename S, typename T>(S, T) {
    auto a = arguments<S, T>(in, by);
    cuda::set_results(a, results);
    OptionalTensor memory;
    cuda::launch_distillation(a, cuda::allocator(input, memory), launch.stream);
  });
  return results.result();
}

Tensor distillation_backward(const LossBackward& of, const Teacher& teacher,
                             const LossTarget& target) {
  const Call call("distillation_backward", of.input);
  const LossInput in = loss_input(call, of.input, target);
  const TeacherInput by = teacher_input(call, in, of.input, teacher);
  const LossSaved saved = loss_saved(call, in, of, 5);
  const cuda::Launch launch(of.input);
  Tensor gradient = empty_like_dense(of.input);
  if (in.numel == 0) return gradient;
  for_dtypes(in, by, [&]<typename S, typename T>(S, T) {
    auto a = arguments<S, T>(in, by);
    cuda::set_backward(a, saved, gradient);
    OptionalTensor memory;
    cuda::launch_distillation_backward(a, cuda::allocator(of.input, memory), launch.stream);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("distillation", TORCH_BOX(&distillation_op<distillation>));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward_op<distillation_backward>));
}

}  // namespace reg_kernels
