// Mixup on the CPU key: torch's thread pool over the loops of mixup.simd.cpp.
#include "mixup.h"

#include "../torch/mixup.h"
#include "cache.h"

#include <memory>

namespace reg_kernels {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at the least
// Bytes of the wider of x and y: several fit the second-level cache.
constexpr int64_t kTile = 16384;
constexpr int64_t kPositions = 16;  // of a tile at the least, where the layout changes
constexpr int64_t kLongPlane = 64;  // elements of a channel from which on it is scaled by itself

void check_values(const MixupBlend& blend, const char* op) {
  for (int64_t n = 0; n < blend.samples; ++n) {
    const int64_t partner = blend.partner_of(n);
    RK_REQUIRE(partner >= 0 && partner < blend.samples, op, "index",
               words("in [0, ", blend.samples, ")"), partner);
    const double lam = blend.lam_of(n);
    RK_REQUIRE(lam >= 0 && lam <= 1, op, "lam", "in [0, 1]", lam);
    const MixupBox box = blend.box_of(n);
    RK_REQUIRE(box.fits(blend.height, blend.width), op, "boxes",
               "(x1, y1, x2, y2) inside of the image",
               words("(", box.x1, ", ", box.y1, ", ", box.x2, ", ", box.y2, ")"));
  }
}

// The samples in the order of MixupTask, path by path; `starts` are where paths begin, and N. With
// a permutation the paths are its cycles.
template <typename Next>
std::vector<int64_t> paths(int64_t samples, const Next& next, std::vector<int64_t>* starts) {
  std::vector<int64_t> order;
  order.reserve(samples);
  std::vector<bool> seen(samples);
  for (int64_t first = 0; first < samples; ++first) {
    if (seen[first]) continue;
    if (starts) starts->push_back(static_cast<int64_t>(order.size()));
    for (int64_t n = first; !seen[n]; n = next(n)) {
      seen[n] = true;
      order.push_back(n);
    }
  }
  if (starts) starts->push_back(samples);
  return order;
}

// Scale and shift as the loops want them: for each channel, or spread over the elements.
struct Constants {
  std::unique_ptr<char[]> values;

  Constants(MixupTask& task, const void* scale, const void* shift) {
    task.scale = scale;
    task.shift = shift;
    const ChannelLayout& layout = task.layout;
    task.constant = scale && !task.to_channels_last && layout.length >= kLongPlane;
    if (!scale || task.constant) return;
    task.in_double ? spread<double>(task) : spread<float>(task);
  }

 private:
  template <typename C>
  void spread(MixupTask& task) {
    const int64_t channels = task.layout.channels;
    const int64_t period = task.to_channels_last ? channels : task.numel;
    const bool turns = task.to_channels_last != task.layout.channels_last;
    const int64_t most = turns ? task.tile * channels : kMixupChunk;  // elements of one write
    const int64_t repeat = task.to_channels_last ? 1 : task.layout.length;
    const int64_t count = period + most;
    values.reset(new char[2 * count * sizeof(C)]);
    C* to = reinterpret_cast<C*>(values.get());
    for (const void** from : {&task.scale, &task.shift}) {
      if (*from == nullptr) continue;
      const C* each = static_cast<const C*>(*from);
      for (int64_t i = 0; i < count; ++i) to[i] = each[i / repeat % channels];
      *from = to;
      to += count;
    }
  }
};

// `layout` is x's; y is x itself or an output.
MixupTask make_task(const Call& call, const Tensor& x, const Tensor& y, const MixupBlend& blend,
                    const ChannelLayout& layout) {
  MixupTask task{};
  task.y = call.written(y, "input");
  task.x = call.data(x, "input");
  task.from = x.scalar_type() == ScalarType::Byte ? kBytes : static_cast<int>(dtype_of(x, call.op));
  task.to = dtype_of(y, call.op);
  task.in_double = computes_in_double(x, y);
  task.blend = blend;
  task.layout = layout;
  task.to_channels_last = batch_layout(y, call.op).channels_last;
  task.numel = task.layout.channels * task.layout.length;
  const int64_t tile = kTile / static_cast<int64_t>(std::max(x.element_size(), y.element_size()));
  task.tile = tile;
  task.tiles = ceil_div(task.numel, task.tile);
  if (task.to_channels_last != task.layout.channels_last) {
    task.tile = std::max(kPositions, tile / std::max<int64_t>(1, task.layout.channels));
    task.tiles = ceil_div(task.layout.length, task.tile);
  }
  // In place, the line that a store would read is the one just loaded: nothing to save. From half
  // of the cache on, since x and y together do not stay in it while tiles of all samples take
  // turns.
  task.stream = task.x != task.y &&
                y.numel() * static_cast<int64_t>(y.element_size()) >= last_level_cache_bytes() / 2;
  return task;
}

void run(const MixupTask& task, void (*leaf)(const MixupTask&, int64_t, int64_t)) {
  const int64_t items = task.blend.samples * task.tiles;
  const int64_t grain = std::max<int64_t>(1, kGrain * task.tiles / task.numel);
  torch::stable::parallel_for(0, items, grain,
                              [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
}

Tensor mixup(const Tensor& input, const OptionalTensor& lam, double one_lam,
             const OptionalTensor& index, const OptionalTensor& boxes, const OptionalTensor& scale,
             const OptionalTensor& shift, ScalarType dtype, bool channels_last) {
  const Call call("mixup", input);
  const ChannelLayout layout = batch_layout(input, call.op);
  for_mixup_input(input, call.op, [](auto) {});  // its dtype
  const MixupBlend blend = mixup_blend(call, input, lam, one_lam, index, boxes);
  Tensor output = empty_batch(input, dtype, channels_last, call.op);
  const void* const scales = mixup_constants(call, scale, input, output, "scale");
  const void* const shifts = mixup_constants(call, shift, input, output, "shift");
  if (input.numel() == 0) return output;
  check_values(blend, call.op);
  MixupTask task = make_task(call, input, output, blend, layout);
  const Constants constants(task, scales, shifts);
  const auto order = paths(blend.samples, [&](int64_t n) { return blend.partner_of(n); }, nullptr);
  task.order = order.data();
  run(task, RK_LEAF(mixup_range));
  return output;
}

void mixup_(const Tensor& input, const OptionalTensor& lam, double one_lam,
            const OptionalTensor& index, const OptionalTensor& boxes, const OptionalTensor& scale,
            const OptionalTensor& shift) {
  const Call call("mixup_", input);
  const ChannelLayout layout = batch_layout(input, call.op);
  dtype_of(input, call.op);  // no bytes
  const MixupBlend blend = mixup_blend(call, input, lam, one_lam, index, boxes);
  const void* const scales = mixup_constants(call, scale, input, input, "scale");
  const void* const shifts = mixup_constants(call, shift, input, input, "shift");
  check_apart_from_input(call.op, input, lam, index, boxes, scale, shift);
  if (input.numel() == 0) return;
  check_values(blend, call.op);
  std::vector<bool> taken(blend.samples);
  for (int64_t n = 0; n < blend.samples; ++n) {
    RK_REQUIRE(!taken[blend.partner_of(n)], call.op, "index", "a permutation",
               words(blend.partner_of(n), " twice"));
    taken[blend.partner_of(n)] = true;
  }
  MixupTask task = make_task(call, input, input, blend, layout);
  const Constants constants(task, scales, shifts);
  std::vector<int64_t> starts;
  const auto order = paths(blend.samples, [&](int64_t n) { return blend.partner_of(n); }, &starts);
  const int64_t cycles = static_cast<int64_t>(starts.size()) - 1;
  const auto leaf = RK_LEAF(mixup_cycle);
  // Items are cycles of a tile; a cycle lies in one thread's hands, since it reads what it writes.
  const int64_t of_a_cycle = task.numel / task.tiles * blend.samples / cycles;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, of_a_cycle));
  torch::stable::parallel_for(0, cycles * task.tiles, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> saved(new double[task.tile]);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t cycle = item % cycles, tile = item / cycles;
      leaf(task, order.data() + starts[cycle], starts[cycle + 1] - starts[cycle], saved.get(), tile,
           tile + 1);
    }
  });
}

Tensor mixup_backward(const Tensor& grad_output, const OptionalTensor& lam, double one_lam,
                      const OptionalTensor& receivers, const OptionalTensor& starts,
                      const OptionalTensor& boxes, const OptionalTensor& scale, ScalarType dtype,
                      bool channels_last) {
  const Call call("mixup_backward", grad_output);
  const ChannelLayout layout = batch_layout(grad_output, call.op, "grad_output");
  dtype_of(grad_output, call.op, "grad_output");  // no bytes
  const MixupBlend blend = mixup_blend(call, grad_output, lam, one_lam, std::nullopt, boxes);
  const MixupReceivers sorted = mixup_receivers(call, blend, receivers, starts);
  Tensor grad_input = empty_batch(grad_output, dtype, channels_last, call.op);
  const void* const scales = mixup_constants(call, scale, grad_output, grad_input, "scale");
  if (grad_output.numel() == 0) return grad_input;
  check_values(blend, call.op);
  MixupTask task = make_task(call, grad_output, grad_input, blend, layout);
  const int64_t samples = blend.samples;
  task.receivers = sorted.samples;
  task.starts = sorted.starts;
  for (int64_t n = 0; task.receivers && n < samples; ++n) {
    const int64_t m = task.receivers[n], first = task.starts[n], last = task.starts[n + 1];
    RK_REQUIRE(m >= 0 && m < samples && 0 <= first && first <= last && last <= samples, call.op,
               "receivers and starts", "those of an index",
               words("sample ", m, " and [", first, ", ", last, ")"));
  }
  const Constants constants(task, scales, nullptr);
  const auto order = paths(
      samples,
      [&](int64_t n) {
        if (!task.receivers) return samples - 1 - n;
        return task.receivers[std::min(task.starts[n], samples - 1)];
      },
      nullptr);
  task.order = order.data();
  run(task, RK_LEAF(mixup_backward_range));
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("mixup", TORCH_BOX(&mixup));
  m.impl("mixup_", TORCH_BOX(&mixup_));
  m.impl("mixup_backward", TORCH_BOX(&mixup_backward));
}

}  // namespace reg_kernels
