// An op of the random elementwise family on the CPU key: torch's thread pool over the loops of
// elementwise.simd.cpp. Compiled once for each op (elementwise/<op>.h, which comes first).
#include "elementwise_task.h"

#include "../torch/elementwise.h"
#include "cache.h"

namespace reg_kernels {
namespace {

// Elements a thread takes at the least: below it, waking a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// Threads part the work at whole batches of draws, so that none makes some just to discard them.
constexpr int64_t kUnit = 256;

ElementwiseTask make_task(const ElementwiseCall& a, const ChannelLayout& layout) {
  a.check(Op::kNumber);
  const Call& call = a.call;
  const int64_t* state = rng_state_data(call, a.rng_state);
  const double number = a.traced_number ? *traced_p_data(call, *a.traced_number) : a.number;
  const DropoutRate rate = rate_of<Op>(number);
  ElementwiseTask task{};
  task.y = call.written(a.y, "input");
  task.x = call.data(a.x, "input");
  task.residual = a.residual_data();
  task.numel = a.x.numel();
  task.bytes = kTakesBytes<Op> && a.x.scalar_type() == ScalarType::Byte;
  if (!task.bytes) task.dtype = dtype_of(a.x, call.op);
  task.mask_offset = a.element_offset;
  task.threshold = rate.threshold;
  task.scale = rate.scale;
  std::copy_n(a.options, kMostOptions, task.options);
  task.seed = static_cast<uint64_t>(state[0]);
  task.offset = static_cast<uint64_t>(state[1]);
  // In place, the line that a store would read is the one just loaded: nothing to save.
  task.stream = task.x != task.y &&
                task.numel * static_cast<int64_t>(a.x.element_size()) > last_level_cache_bytes();
  task.channels = layout.channels;
  task.length = layout.length;
  task.channels_last = layout.channels_last;
  if constexpr (kScalesChannels<Op>) task.layer_scale = a.scale_of_channels();
  return task;
}

void run(const ElementwiseCall& a) {
  const ElementwiseTask task = make_task(a, a.layout());
  if (task.numel == 0) return;
  if (task.channels_last) {
    const auto leaf = RK_LEAF(channels_range<kOpTag>);
    torch::stable::parallel_for(0, task.numel / task.channels, kGrain / task.channels + 1,
                                [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
    return;
  }
  const auto leaf = a.drawn_for == DrawnFor::element ? RK_LEAF(elements_range<kOpTag>)
                                                     : RK_LEAF(channels_range<kOpTag>);
  const int64_t units = ceil_div(task.numel, kUnit);
  torch::stable::parallel_for(0, units, kGrain / kUnit, [&](int64_t begin, int64_t end) {
    leaf(task, begin * kUnit, min(end * kUnit, task.numel));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) { Elementwise<Op, run>::register_in(m); }

}  // namespace reg_kernels
