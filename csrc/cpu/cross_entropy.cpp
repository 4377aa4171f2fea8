// Cross-entropy on the CPU key: torch's thread pool over the loops of cross_entropy.simd.cpp.
#include "loss_task.h"

namespace reg_kernels {
namespace {

// Below it, several positions fill a vector better than the classes of one do.
constexpr int64_t kShortRows = 56;

void run(const LossTask& task, void (*leaf)(const LossTask&, int64_t, int64_t)) {
  for_units(task, [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

LossResult cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& partner,
                         const OptionalTensor& lam, double one_lam, const OptionalTensor& weight,
                         int64_t ignore_index, double label_smoothing, int64_t reduction,
                         const OptionalTensor& traced_smoothing, bool keep_gradient) {
  const Call call("cross_entropy", input);
  const LossInput in = loss_input(call, input, target, partner, lam, one_lam, weight, ignore_index,
                                  label_smoothing, reduction, traced_smoothing);
  LossTensors results(input, in.reduction, 2, keep_gradient);
  if (in.numel == 0) return results.of_nothing(in.reduction);
  LossTask task = loss_task(in, kShortRows, call.op);
  LossOutputs outputs(task, in, results);
  run(task, RK_LEAF(cross_entropy_units));
  return outputs.finish(task, in);
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
  Tensor gradient = empty_like_dense(input);
  if (in.numel == 0) return gradient;
  LossTask task = loss_task(in, kShortRows, call.op);
  set_backward(task, in, saved, gradient);
  run(task, RK_LEAF(cross_entropy_backward_units));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace reg_kernels
