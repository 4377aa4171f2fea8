// The optimizer step on the CPU key: torch's thread pool over the loops of optimizer_step.simd.cpp.
#include "optimizer_step.h"

#include "../torch/optimizer_step.h"
#include "share_out.h"

namespace reg_kernels {
namespace {

constexpr int64_t kUnit = 512;  // elements: the loops' tile

// Asks for the first lines of a tensor's arrays, for a short tensor all of them. Where tensors are
// many, their memory has left the caches since the last step and is waited for tensor by tensor.
void ask_for(const TensorTable& table, int64_t tensor) {
  constexpr int kBytes = 256;
  for (int row = 0; row <= static_cast<int>(TableRow::step); ++row) {
    const auto* array = table.address<const char>(static_cast<TableRow>(row), tensor);
    for (int byte = 0; array && byte < kBytes; byte += 64) __builtin_prefetch(array + byte);
  }
}

// The norm's square is summed up by launch, in their order.
double norm_of(const double* parts, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += parts[i];
  return std::sqrt(total);
}

void optimizer_step_table(const Tensor& data, int64_t count, int64_t seal, int64_t algorithm,
                          const std::vector<int64_t>& dtypes, const std::vector<double>& numbers,
                          const std::vector<int64_t>& flags, const std::vector<Tensor>& rates,
                          int64_t rounding, const OptionalTensor& squares, double max_norm,
                          const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                          const OptionalTensor& rng_state, const Tensor& /*scratch*/) {
  const Call call("optimizer_step", data);
  const SealedTable sealed = sealed_table(call, data, count, seal);
  const TensorTable& table = sealed.table;
  const auto groups = optimizer_groups(call, numbers, flags, rates);
  const OptimizerKind kind = optimizer_kind(call, data, sealed, static_cast<int64_t>(groups.size()),
                                            algorithm, rounding, dtypes, rng_state.has_value());
  const float* found = call.number<float>(found_inf, ScalarType::Float, "found_inf");
  const float* scale = call.number<float>(grad_scale, ScalarType::Float, "grad_scale");
  const double* parts = squares_data(call, squares);
  const int64_t* state = rng_state ? rng_state_data(call, *rng_state) : nullptr;
  if (found && *found != 0.0f) return;

  double gradient = scale ? 1.0 / *scale : 1.0;
  if (parts) gradient *= clip_factor(norm_of(parts, squares->numel()) * gradient, max_norm);

  OptimizerTask shared{};
  shared.algorithm = kind.algorithm;
  shared.rounding = kind.rounding;
  shared.dtype = kind.dtype;
  shared.moments_dtype = kind.moments;
  if (state) {
    shared.seed = static_cast<uint64_t>(state[0]);
    shared.offset = static_cast<uint64_t>(state[1]);
  }

  const auto leaf = RK_LEAF(optimizer_step_range);
  // Tensors of one group that have taken the same number of steps share their constants: two powers
  // cost as much as a small tensor's update.
  struct Known {
    int64_t group = -1;
    float step = 0;
    OptimizerConstants constants{};
  };
  constexpr int64_t kAhead = 2;  // tensors
  const auto update = [&](Known& known, int64_t i, int64_t begin, int64_t end) {
    if (begin == 0 && i + kAhead < count) ask_for(table, i + kAhead);
    const auto* step = table.address<const float>(TableRow::step, i);
    const float next = step ? *step + 1.0f : 1.0f;
    const int64_t group = table.at(TableRow::group, i);
    if (known.group != group || known.step != next) {
      known = {group, next, optimizer_constants(shared.algorithm, groups[group], next, gradient)};
    }
    OptimizerTask task = shared;
    task.constants = known.constants;
    task.coupled = groups[group].decay == Decay::l2 && groups[group].weight_decay != 0;
    task.param = table.address(TableRow::param, i);
    task.grad = table.address(TableRow::grad, i);
    task.first_moment = table.address(TableRow::first_moment, i);
    task.second_moment = table.address(TableRow::second_moment, i);
    task.max_second_moment = table.address(TableRow::max_second_moment, i);
    task.ema = table.address(TableRow::ema, i);
    task.compensation = table.address(TableRow::compensation, i);
    if (task.rounding == Rounding::stochastic) task.places = draw_places(table, i);
    leaf(task, begin, end);
  };
  share_out(table, kUnit, [&] {
    return [&, known = Known{}](int64_t i, int64_t begin, int64_t end) mutable {
      update(known, i, begin, end);
    };
  });
  for (int64_t i = 0; i < count; ++i) {
    if (auto* step = table.address<float>(TableRow::step, i)) *step += 1.0f;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("optimizer_step_table", TORCH_BOX(&optimizer_step_table));
}

}  // namespace reg_kernels
