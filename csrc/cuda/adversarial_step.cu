// Adversarial steps on the CUDA key: tensors to raw pointers. The kernels are in
// adversarial_step.cuh.
#include "adversarial_step.cuh"

#include "../torch/adversarial_step.h"
#include "../torch/cuda.cuh"

namespace reg_kernels {
namespace {

void adversarial_step_(const Tensor& adv, const Tensor& grad, const Tensor& clean,
                       const OptionalTensor& step_sizes, double step_size,
                       const OptionalTensor& radii, double eps, int64_t norm, double lower,
                       double upper, const OptionalTensor& channels) {
  const Call call("adversarial_step_", adv);
  const AdversarialArguments a = adversarial_arguments(
      call, adv, grad, clean, step_sizes, step_size, radii, eps, norm, lower, upper, channels);
  const cuda::Launch launch(adv);
  for_dtype(adv, call.op, [&]<typename T>(T) {
    using C = compute_t<T>;
    const cuda::AdversarialStep<T> step{static_cast<T*>(a.adv),
                                        static_cast<const T*>(a.grad),
                                        static_cast<const T*>(a.clean),
                                        a.samples,
                                        a.layout,
                                        a.step_sizes,
                                        a.eps,
                                        static_cast<C>(a.lower),
                                        static_cast<C>(a.upper),
                                        static_cast<const C*>(a.channels)};
    cuda::launch_adversarial_step(step, a.norm, launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("adversarial_step_", TORCH_BOX(&adversarial_step_));
}

}  // namespace reg_kernels
