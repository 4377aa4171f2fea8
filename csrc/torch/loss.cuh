// The tensors of a loss of logits as the kernels' arguments, on the CUDA key.
#pragma once

#include "cross_entropy.h"
#include "cuda.cuh"
#include "reg_kernels/loss.cuh"

namespace reg_kernels {
namespace cuda {

// A loss's own arguments are to be added, and a place for the results.
template <typename Arguments>
Arguments loss_arguments(const LossInput& in) {
  Arguments a{};
  a.x = static_cast<decltype(a.x)>(in.x);
  a.positions = in.positions;
  a.classes = in.layout.channels;
  a.length = in.classes_last ? 1 : in.layout.length;
  a.labels = in.labels;
  a.weight = static_cast<decltype(a.weight)>(in.weight);
  a.reduction = in.reduction;
  return a;
}

template <typename T>
void set_results(LossArguments<T>& a, LossTensors& results) {
  using C = compute_t<T>;
  a.stats = static_cast<C*>(results.stats.mutable_data_ptr());
  (a.reduction == Reduction::none ? a.losses : a.sum.loss) =
      static_cast<C*>(results.loss.mutable_data_ptr());
  if (results.has_gradient) a.gradient = static_cast<T*>(results.gradient.mutable_data_ptr());
}

template <typename T>
void set_backward(LossArguments<T>& a, const LossSaved& saved, Tensor& gradient) {
  using C = compute_t<T>;
  a.stats = static_cast<C*>(const_cast<void*>(saved.stats));
  a.grad_output = {const_cast<void*>(saved.grad_output),
                   sizeof(C) == sizeof(double) ? DType::float64 : DType::float32};
  a.one_grad_output = a.reduction != Reduction::none;
  a.gradient = static_cast<T*>(gradient.mutable_data_ptr());
}

}  // namespace cuda
}  // namespace reg_kernels
