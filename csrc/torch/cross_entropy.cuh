// What the CUDA launchers of losses read of tensors.
#pragma once

#include "cross_entropy.h"
#include "cuda.cuh"

namespace reg_kernels {
namespace cuda {

// Arguments that loss_input has checked, all on the input's device.
inline LossInput device_loss_input(const Tensor& input, const OptionalTensor& target,
                                   const OptionalTensor& partner, const OptionalTensor& lam,
                                   double one_lam, const OptionalTensor& weight,
                                   int64_t ignore_index, double smoothing, int64_t reduction,
                                   const OptionalTensor& traced_smoothing, const char* op) {
  if (target) check_device(input, *target, op, "target");
  if (partner) check_device(input, *partner, op, "partner");
  if (lam) check_device(input, *lam, op, "lam");
  if (weight) check_device(input, *weight, op, "weight");
  if (traced_smoothing) check_device(input, *traced_smoothing, op, "traced_smoothing");
  return loss_input(input, target, partner, lam, one_lam, weight, ignore_index, smoothing,
                    reduction, traced_smoothing, op);
}

// That a backward on x's device may read the loss's gradient, one number, or one for each position
// where the loss is not reduced, and `count` stats of each position.
inline void check_backward(const Tensor& x, const LossInput& in, const Tensor& grad_output,
                           const Tensor& stats, int64_t count, const char* op) {
  check_device(x, grad_output, op, "grad_output");
  check_device(x, stats, op, "stats");
  const int64_t losses = in.reduction == Reduction::none ? in.positions : 1;
  STD_TORCH_CHECK(grad_output.is_contiguous() && grad_output.numel() == losses, op,
                  ": grad_output must be contiguous, the loss's gradient");
  const ScalarType compute = in.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(stats.scalar_type() == compute && stats.is_contiguous() &&
                      stats.numel() == count * in.positions,
                  op, ": stats are not this forward's");
}

}  // namespace cuda
}  // namespace reg_kernels
