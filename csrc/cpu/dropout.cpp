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

DropoutTask make_task(const Call& call, const Tensor& x, const Tensor& y, double p,
                      const Tensor& rng_state, int64_t mask_offset,
                      const OptionalTensor& traced_p) {
  check_element_offset(mask_offset, call.op);
  check_probability(p, call.op);
  const int64_t* state = rng_state_data(call, rng_state);
  if (traced_p) p = *traced_p_data(call, *traced_p);
  const DropoutRate rate = DropoutRate::from_probability(p);
  DropoutTask task{};
  task.y = call.written(y, "input");
  task.x = call.data(x, "input");
  task.numel = x.numel();
  task.dtype = dtype_of(x, call.op);
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

void run_feature(const Call& call, const Tensor& x, const Tensor& y, double p,
                 const Tensor& rng_state, int64_t mask_offset, const OptionalTensor& traced_p) {
  const ChannelLayout layout = channel_layout(x, call.op);
  DropoutTask task = make_task(call, x, y, p, rng_state, mask_offset, traced_p);
  if (task.numel == 0) return;
  task.channels = layout.channels;
  task.length = layout.length;
  task.channels_last = layout.channels_last;
  const int64_t row = layout.channels_last ? layout.channels : layout.length;
  const auto leaf = RK_LEAF(feature_dropout_range);
  torch::stable::parallel_for(0, task.numel / row, kGrain / row + 1,
                              [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

Tensor dropout(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
               const OptionalTensor& traced_p) {
  const Call call("dropout", input);
  const Tensor x = dense(call, input);
  Tensor y = empty_like_dense(x);
  run(make_task(call, x, y, p, rng_state, element_offset, traced_p));
  return y;
}

void dropout_(const Tensor& input, double p, const Tensor& rng_state, int64_t element_offset,
              const OptionalTensor& traced_p) {
  const Call call("dropout_", input);
  check_dense(input, call.op, "input");
  run(make_task(call, input, input, p, rng_state, element_offset, traced_p));
}

Tensor feature_dropout(const Tensor& input, double p, const Tensor& rng_state,
                       int64_t element_offset, const OptionalTensor& traced_p) {
  const Call call("feature_dropout", input);
  channel_layout(input, call.op);
  Tensor y = empty_like_dense(input);
  run_feature(call, input, y, p, rng_state, element_offset, traced_p);
  return y;
}

void feature_dropout_(const Tensor& input, double p, const Tensor& rng_state,
                      int64_t element_offset, const OptionalTensor& traced_p) {
  const Call call("feature_dropout_", input);
  run_feature(call, input, input, p, rng_state, element_offset, traced_p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_", TORCH_BOX(&dropout_));
  m.impl("feature_dropout", TORCH_BOX(&feature_dropout));
  m.impl("feature_dropout_", TORCH_BOX(&feature_dropout_));
}

}  // namespace reg_kernels
