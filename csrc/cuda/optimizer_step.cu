// The optimizer step on the CUDA key: tensors to raw pointers. The kernels are in
// optimizer_step.cuh.
#include "optimizer_step.cuh"

#include "../torch/optimizer_step.h"
#include "../torch/tensor_table.cuh"

namespace reg_kernels {
namespace {

constexpr const char* kOp = "optimizer_step";

// Calls f with a value of the parameters' type and one of the moments'.
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
  STD_TORCH_CHECK(false, kOp, ": no kernel for parameters of dtype ", static_cast<int>(dtype),
                  " with moments of dtype ", static_cast<int>(moments));
}

// One number that is on the device, or null.
const float* device_scalar(const Tensor& data, const std::optional<Tensor>& tensor,
                           const char* name) {
  if (tensor) cuda::check_device(data, *tensor, kOp, name);
  return scalar_of<float>(tensor, ScalarType::Float, name);
}

void optimizer_step_table(const Tensor& data, int64_t count, int64_t algorithm,
                          const std::vector<int64_t>& dtypes, const std::vector<double>& numbers,
                          const std::vector<int64_t>& flags, const std::vector<Tensor>& rates,
                          int64_t rounding, const std::optional<Tensor>& squares, double max_norm,
                          const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf,
                          const std::optional<Tensor>& rng_state, const Tensor& scratch) {
  const cuda::DeviceTable of = cuda::device_table(data, count, kOp);
  cuda::OptimizerStep step{};
  step.table = of.table;
  step.chunks = of.chunks;
  step.ticket = reinterpret_cast<unsigned*>(cuda::scratch_of(data, scratch, 0, kOp));
  step.grad_scale = device_scalar(data, grad_scale, "grad_scale");
  step.found_inf = device_scalar(data, found_inf, "found_inf");
  step.max_norm = max_norm;
  if (squares) {
    cuda::check_device(data, *squares, kOp, "squares");
    STD_TORCH_CHECK(squares->scalar_type() == ScalarType::Double && squares->is_contiguous(), kOp,
                    ": squares must be contiguous float64");
    step.squares = static_cast<const double*>(squares->const_data_ptr());
    step.squares_count = squares->numel();
  }
  if (rng_state) step.rng = cuda::read_rng_state(data, *rng_state, kOp);
  step.rounding = static_cast<Rounding>(rounding);

  for (const Tensor& rate : rates) cuda::check_device(data, rate, kOp, "a learning rate");
  const auto groups = optimizer_groups(numbers, flags, rates);
  STD_TORCH_CHECK(groups.size() <= cuda::kMostGroups, kOp, ": expected at most ", cuda::kMostGroups,
                  " groups, got ", groups.size());
  std::copy(groups.begin(), groups.end(), step.groups);

  STD_TORCH_CHECK(dtypes.size() == 2, kOp, ": expected the parameters' and the moments' dtype");
  const cuda::Launch launch(data);
  for_dtypes(
      dtype_from(dtypes[0], kOp), dtype_from(dtypes[1], kOp), [&]<typename T, typename S>(T, S) {
        cuda::launch_optimizer_step<T, S>(static_cast<Algorithm>(algorithm), step, launch.stream);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("optimizer_step_table", TORCH_BOX(&optimizer_step_table));
}

}  // namespace reg_kernels
