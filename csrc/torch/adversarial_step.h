// An adversarial step's arguments as both launchers, CPU and CUDA, read them: what
// ops/adversarial_step.py declares, checked for what memory safety rests on, as raw pointers.
#pragma once

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/adversarial_step_math.h"

namespace reg_kernels {

struct AdversarialArguments {
  void* adv;  // (N, C, L), as `layout` says
  const void *grad, *clean;
  int64_t samples;
  ChannelLayout layout;
  BallNorm norm;
  SampleNumbers step_sizes, eps;
  double lower, upper;   // where there are no channels
  const void* channels;  // (4, C) of the type that is computed in: ChannelNumbers; or null

  int64_t numel() const { return layout.channels * layout.length; }  // of a sample
};

inline SampleNumbers sample_numbers(const Call& call, const OptionalTensor& values,
                                    double otherwise, int64_t samples, const char* name) {
  if (!values) return {nullptr, true, otherwise};
  const bool one = values->numel() == 1;
  const void* data = call.vector(*values, ScalarType::Double, one ? 1 : samples, name);
  return {static_cast<const double*>(data), one, otherwise};
}

inline AdversarialArguments adversarial_arguments(const Call& call, const Tensor& adv,
                                                  const Tensor& grad, const Tensor& clean,
                                                  const OptionalTensor& step_sizes,
                                                  double step_size, const OptionalTensor& radii,
                                                  double eps, int64_t norm, double lower,
                                                  double upper, const OptionalTensor& channels) {
  AdversarialArguments a{};
  a.layout = batch_layout(adv, call.op, "adv");
  const DType dtype = dtype_of(adv, call.op, "adv");
  a.adv = call.written(adv, "adv");
  a.grad = data_like(call, adv, grad, "grad");
  a.clean = data_like(call, adv, clean, "clean");
  a.samples = adv.size(0);
  RK_REQUIRE(norm >= 0 && norm <= 2, call.op, "norm", "0, 1 or 2", norm);
  a.norm = static_cast<BallNorm>(norm);
  a.step_sizes = sample_numbers(call, step_sizes, step_size, a.samples, "step_sizes");
  a.eps = sample_numbers(call, radii, eps, a.samples, "radii");
  a.lower = lower;
  a.upper = upper;
  if (channels) {
    const int64_t count = checked_product(4, a.layout.channels, call.op);
    a.channels = call.vector(*channels, compute_type_of(dtype), count, "channels");
  }
  check_apart(call.op, adv, grad, "grad");
  check_apart(call.op, adv, clean, "clean");
  check_apart(call.op, adv, step_sizes, "step_sizes");
  check_apart(call.op, adv, radii, "radii");
  check_apart(call.op, adv, channels, "channels");
  return a;
}

}  // namespace reg_kernels
