// Distillation on the CPU key: torch's thread pool over the loops of distillation.simd.cpp.
#include "distillation.h"

#include "loss_task.h"

namespace reg_kernels {
namespace {

DistillationTask make_task(const Call& call, const LossInput& in, const Tensor& teacher,
                           const void* teacher_values, double temperature, double alpha,
                           const double* traced_softness) {
  DistillationTask task{};
  task.loss = loss_task(in, 0, call.op);
  task.teacher = teacher_values;
  task.teacher_dtype = dtype_of(teacher, call.op, "teacher");
  task.temperature = traced_softness ? traced_softness[0] : temperature;
  task.alpha = traced_softness ? traced_softness[1] : alpha;
  return task;
}

void run(const DistillationTask& task, void (*leaf)(const DistillationTask&, int64_t, int64_t)) {
  for_units(task.loss, [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
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
  LossTensors results(input, in.reduction, 5, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  DistillationTask task =
      make_task(call, in, teacher, teacher_values, temperature, alpha, softness);
  LossOutputs outputs(task.loss, in, results);
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
  const Call call("distillation_backward", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  const void* teacher_values = teacher_data(call, in, input, teacher);
  const double* softness = traced_numbers(call, traced_softness, 2, "traced_softness");
  const LossSaved saved = loss_saved(call, in, grad_output, stats, 5);
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  DistillationTask task =
      make_task(call, in, teacher, teacher_values, temperature, alpha, softness);
  set_backward(task.loss, in, saved, gradient);
  run(task, RK_LEAF(distillation_backward_units));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("distillation", TORCH_BOX(&distillation));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace reg_kernels
