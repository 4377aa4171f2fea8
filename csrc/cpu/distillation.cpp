// Distillation on the CPU key: torch's thread pool over the loops of distillation.simd.cpp.
#include "distillation.h"

#include "loss_task.h"

namespace reg_kernels {
namespace {

DistillationTask make_task(const LossInput& in, const Tensor& input, const Tensor& teacher,
                           double temperature, double alpha, const OptionalTensor& traced_softness,
                           const char* op) {
  STD_TORCH_CHECK(has_layout_of(input, teacher), op,
                  ": teacher must have the input's shape and strides");
  DistillationTask task{};
  task.loss = loss_task(in, 0, op);
  task.teacher = teacher.const_data_ptr();
  task.teacher_dtype = dtype_of(teacher, op);
  STD_TORCH_CHECK((task.teacher_dtype == DType::float64) == (in.dtype == DType::float64), op,
                  ": teacher and input must both be float64, or neither");
  STD_TORCH_CHECK(!in.probabilities, op, ": labels must be class indices");
  const double* traced = traced_numbers(traced_softness, 2, op);
  task.temperature = traced ? traced[0] : temperature;
  task.alpha = traced ? traced[1] : alpha;
  return task;
}

void run(const DistillationTask& task, void (*leaf)(const DistillationTask&, int64_t, int64_t)) {
  for_units(task.loss, [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> distillation(
    const Tensor& input, const Tensor& teacher, const OptionalTensor& target,
    const OptionalTensor& partner, const OptionalTensor& lam, double one_lam,
    const OptionalTensor& weight, int64_t ignore_index, double label_smoothing, int64_t reduction,
    const OptionalTensor& traced_smoothing, double temperature, double alpha,
    const OptionalTensor& traced_softness, bool keep_gradient) {
  const char* op = "distillation";
  const LossInput in = loss_input(input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing, op);
  if (in.numel == 0) return loss_of_nothing(input, in.reduction, 5, keep_gradient);
  DistillationTask task = make_task(in, input, teacher, temperature, alpha, traced_softness, op);
  LossOutputs outputs(task.loss, in, input, 5, keep_gradient);
  run(task, RK_LEAF(distillation_units));
  return outputs.finish(task.loss, in);
}

Tensor distillation_backward(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                             const Tensor& teacher, const OptionalTensor& target,
                             const OptionalTensor& partner, const OptionalTensor& lam,
                             double one_lam, const OptionalTensor& weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction,
                             const OptionalTensor& traced_smoothing, double temperature,
                             double alpha, const OptionalTensor& traced_softness) {
  const char* op = "distillation_backward";
  const LossInput in = loss_input(input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing, op);
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  DistillationTask task = make_task(in, input, teacher, temperature, alpha, traced_softness, op);
  set_backward(task.loss, in, grad_output, stats, 5, gradient, op);
  run(task, RK_LEAF(distillation_backward_units));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("distillation", TORCH_BOX(&distillation));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace reg_kernels
