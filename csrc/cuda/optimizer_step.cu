// The optimizer step on the CUDA key: tensors to raw pointers. The kernels are in
// optimizer_step.cuh.
#include "optimizer_step.cuh"

#include "../torch/cuda.cuh"
#include "../torch/optimizer_step.h"

namespace reg_kernels {
namespace {

// Calls f with a value of the parameters' type and one of the moments', those of optimizer_kind.
template <typename F>
void for_dtypes(DType dtype, DType moments, F&& f) {
  const auto is = [&](DType a, DType b) { return dtype == a && moments == b; };
  if (is(DType::float64, DType::float64)) return f(double{}, double{});
  if (is(DType::float32, DType::float32)) return f(float{}, float{});
  if (is(DType::float32, DType::bfloat16)) return f(float{}, bfloat16{});
  if (is(DType::float16, DType::float16)) return f(float16{}, float16{});
  if (is(DType::float16, DType::float32)) return f(float16{}, float{});
  if (is(DType::bfloat16, DType::bfloat16)) return f(bfloat16{}, bfloat16{});
  if (is(DType::bfloat16, DType::float32)) return f(bfloat16{}, float{});
}

void optimizer_step_table(const Tensor& data, int64_t count, int64_t seal, int64_t algorithm,
                          const std::vector<int64_t>& dtypes, const std::vector<double>& numbers,
                          const std::vector<int64_t>& flags, const std::vector<Tensor>& rates,
                          int64_t rounding, const OptionalTensor& squares, double max_norm,
                          const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                          const OptionalTensor& rng_state, const Tensor& scratch) {
  const Call call("optimizer_step", data);
  cuda::OptimizerStep step{};
  const SealedTable sealed = sealed_table(call, data, count, seal);
  step.table = sealed.table;
  step.chunks = table_chunks(data, count);
  step.ticket = reinterpret_cast<unsigned*>(scratch_of(call, data, scratch, 0));
  step.grad_scale = call.number<float>(grad_scale, ScalarType::Float, "grad_scale");
  step.found_inf = call.number<float>(found_inf, ScalarType::Float, "found_inf");
  step.max_norm = max_norm;
  step.squares = squares_data(call, squares);
  step.squares_count = squares ? squares->numel() : 0;
  if (rng_state) step.rng = cuda::read_rng_state(call, *rng_state);

  const auto groups = optimizer_groups(call, numbers, flags, rates);
  RK_REQUIRE(groups.size() <= cuda::kMostGroups, call.op, "groups",
             words("at most ", cuda::kMostGroups), groups.size());
  std::copy(groups.begin(), groups.end(), step.groups);
  const OptimizerKind kind = optimizer_kind(call, data, sealed, static_cast<int64_t>(groups.size()),
                                            algorithm, rounding, dtypes, rng_state.has_value());
  step.rounding = kind.rounding;

  const cuda::Launch launch(data);
  for_dtypes(kind.dtype, kind.moments, [&]<typename T, typename S>(T, S) {
    cuda::launch_optimizer_step<T, S>(kind.algorithm, step, launch.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("optimizer_step_table", TORCH_BOX(&optimizer_step_table));
}

}  // namespace reg_kernels
