// Dropout on the CPU key: torch's thread pool over the loops of dropout.simd.cpp.
#include "dropout.h"

#include "../torch/channel_layout.h"
#include "reg_kernels/dropout_math.h"
#include "cache.h"

namespace reg_kernels {
namespace {

// Elements a thread takes at the least: below it, waking a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// Threads part the work at whole batches of draws, so that none makes some just to discard them.
constexpr int64_t kUnit = 256;

DropoutTask make_task(const Tensor& x, const Tensor& y, double p, const Tensor& rng_state,
                      int64_t mask_offset, const std::optional<Tensor>& traced_p) {
  check_rng_state(rng_state, "dropout");
  check_element_offset(mask_offset, "dropout");
  STD_TORCH_CHECK(rng_state.is_cpu(), "dropout: rng_state must be on the CPU for a CPU input");
  const auto* state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  if (traced_p) {
    check_probability(*traced_p, "dropout");
    STD_TORCH_CHECK(traced_p->is_cpu(), "dropout: traced_p must be on the CPU for a CPU input");
    p = *static_cast<const double*>(traced_p->const_data_ptr());
  }
  const DropoutRate rate = DropoutRate::from_probability(p);
  DropoutTask task{};
  task.x = x.const_data_ptr();
  task.y = y.mutable_data_ptr();
  task.numel = x.numel();
  task.dtype = dtype_of(x, "dropout");
  task.mask_offset = mask_offset;
  task.threshold = rate.threshold;
  task.scale = rate.scale;
  task.seed = static_cast<uint64_t>(state[0]);
  task.offset = static_cast<uint64_t>(state[1]);
  // In place, the line that a store would read is the one just loaded: nothing to save.
  task.stream = task.x != task.y &&
                task.numel * static_cast<int64_t>(x.element_size()) > last_level_cache_bytes();
  return task;
}

void run(const DropoutTask& task) {
  if (task.numel == 0) return;
  const auto leaf = RK_LEAF(dropout_range);
  const int64_t units = (task.numel + kUnit - 1) / kUnit;
  torch::stable::parallel_for(0, units, kGrain / kUnit, [&](int64_t begin, int64_t end) {
    leaf(task, begin * kUnit, std::min(end * kUnit, task.numel));
  });
}

void run_feature(DropoutTask task, const Tensor& x) {
  if (task.numel == 0) return;
  const ChannelLayout layout = channel_layout(x, "feature_dropout");
  task.channels = layout.channels;
  task.length = layout.length;
  task.channels_last = layout.channels_last;
  const int64_t row = layout.channels_last ? layout.channels : layout.length;
  const auto leaf = RK_LEAF(feature_dropout_range);
  torch::stable::parallel_for(0, task.numel / row, kGrain / row + 1,
                              [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

Tensor dropout(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
               const std::optional<Tensor>& traced_p) {
  const Tensor x = dense(input);
  Tensor y = empty_like_dense(x);
  run(make_task(x, y, p, rng_state, element_offset, traced_p));
  return y;
}

void dropout_(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
              const std::optional<Tensor>& traced_p) {
  check_dense(input, "dropout_");
  run(make_task(input, input, p, rng_state, element_offset, traced_p));
}

Tensor feature_dropout(const Tensor& input, double p, const Tensor& rng_state,
                       int64_t element_offset, const std::optional<Tensor>& traced_p) {
  Tensor y = empty_like_dense(input);
  run_feature(make_task(input, y, p, rng_state, element_offset, traced_p), input);
  return y;
}

void feature_dropout_(const Tensor& input, double p, const Tensor& rng_state,
                      int64_t element_offset, const std::optional<Tensor>& traced_p) {
  run_feature(make_task(input, input, p, rng_state, element_offset, traced_p), input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_", TORCH_BOX(&dropout_));
  m.impl("feature_dropout", TORCH_BOX(&feature_dropout));
  m.impl("feature_dropout_", TORCH_BOX(&feature_dropout_));
}

}  // namespace reg_kernels
