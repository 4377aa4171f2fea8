// Subsets of samples on the CUDA key: tensors to raw pointers. The kernels are in subset.cuh.
#include "subset.cuh"

#include "../torch/cuda.cuh"
#include "../torch/subset.h"

namespace reg_kernels {
namespace {

void run(const Call& call, const SubsetCall& a, const Tensor& input, double scale, bool gathers) {
  const cuda::Launch launch(input);
  for_dtype(input, call.op, [&]<typename T>(T) {
    const cuda::Subset<T> subset{static_cast<const T*>(a.x),
                                 static_cast<const T*>(a.residual),
                                 static_cast<T*>(a.y),
                                 a.rows,
                                 a.numel,
                                 static_cast<compute_t<T>>(scale),
                                 gathers};
    cuda::launch_subset(subset, launch.stream);
  });
}

Tensor subset(const Tensor& input, const Tensor& kept, const Tensor& dropped, double scale) {
  const Call call("subset", input);
  const SubsetCall a = SubsetCall::gathering(call, input, kept, dropped);
  run(call, a, input, scale, true);
  return a.result;
}

Tensor subset_add(const Tensor& input, const OptionalTensor& residual, const Tensor& kept,
                  const Tensor& dropped, double scale) {
  const Call call("subset_add", input);
  const SubsetCall a = SubsetCall::adding(call, input, residual, kept, dropped);
  run(call, a, input, scale, false);
  return a.result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("subset", TORCH_BOX(&subset));
  m.impl("subset_add", TORCH_BOX(&subset_add));
}

}  // namespace reg_kernels
