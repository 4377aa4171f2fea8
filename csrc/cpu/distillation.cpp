// Distillation on the CPU key: torch's thread pool over the loops of distillation.simd.cpp.
#include "distillation.h"

#include "loss_task.h"

namespace reg_kernels {
namespace {

DistillationTask make_task(const Call& call, const LossInput& in, const TeacherInput& by) {
  DistillationTask task{};
  task.loss = loss_task(in, 0, call.op);
  task.teacher = by.logits;
  task.teacher_dtype = by.dtype;
  task.temperature = by.traced_softness ? by.traced_softness[0] : by.temperature;
  task.alpha = by.traced_softness ? by.traced_softness[1] : by.alpha;
  return task;
}

void run(const DistillationTask& task, void (*leaf)(const DistillationTask&, int64_t, int64_t)) {
  for_units(task.loss, [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

LossResult distillation(const Tensor& input, const Teacher& teacher, const LossTarget& target,
                        bool keep_gradient) {
  const Call call("distillation", input);
  const LossInput in = loss_input(call, input, target);
  const TeacherInput by = teacher_input(call, in, input, teacher);
  LossTensors results(input, in.reduction, 5, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  DistillationTask task = make_task(call, in, by);
  LossOutputs outputs(task.loss, in, results);
  run(task, RK_LEAF(distillation_units));
  return outputs.finish(task.loss, in);
}

Tensor distillation_backward(const LossBackward& of, const Teacher& teacher,
                             const LossTarget& target) {
  const Call call("distillation_backward", of.input);
  const LossInput in = loss_input(call, of.input, target);
  const TeacherInput by = teacher_input(call, in, of.input, teacher);
  const LossSaved saved = loss_saved(call, in, of, 5);
  Tensor gradient = empty_like_dense(of.input);
  if (in.numel == 0) return gradient;
  DistillationTask task = make_task(call, in, by);
  set_backward(task.loss, in, saved, gradient);
  run(task, RK_LEAF(distillation_backward_units));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("distillation", TORCH_BOX(&distillation_op<distillation>));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward_op<distillation_backward>));
}

}  // namespace reg_kernels
