// Cross-entropy on the CPU key: torch's thread pool over the loops of cross_entropy.simd.cpp.
#include "loss_task.h"

namespace reg_kernels {
namespace {

// Below it, several positions fill a vector better than the classes of one do.
constexpr int64_t kShortRows = 56;

void run(const LossTask& task, void (*leaf)(const LossTask&, int64_t, int64_t)) {
  for_units(task, [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

LossResult cross_entropy(const Tensor& input, const LossTarget& target, bool keep_gradient) {
  const Call call("cross_entropy", input);
  const LossInput in = loss_input(call, input, target);
  LossTensors results(input, in.reduction, 2, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  LossTask task = loss_task(in, kShortRows, call.op);
  LossOutputs outputs(task, in, results);
  run(task, RK_LEAF(cross_entropy_units));
  return outputs.finish(task, in);
}

Tensor cross_entropy_backward(const LossBackward& of, const LossTarget& target) {
  const Call call("cross_entropy_backward", of.input);
  const LossInput in = loss_input(call, of.input, target);
  const LossSaved saved = loss_saved(call, in, of, 2);
  Tensor gradient = empty_like_dense(of.input);
  if (in.numel == 0) return gradient;
  LossTask task = loss_task(in, kShortRows, call.op);
  set_backward(task, in, saved, gradient);
  run(task, RK_LEAF(cross_entropy_backward_units));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy_op<cross_entropy>));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_op<cross_entropy_backward>));
}

}  // namespace reg_kernels
