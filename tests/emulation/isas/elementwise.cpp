// Calls the leaves of csrc/cpu/elementwise.simd.cpp, for the op whose header comes first.
#include "cpu/elementwise_task.h"

#include "isas.h"

namespace isas {

template <typename T, typename Leaf>
void call(const char* name, const Leaf& leaf, const ElementwiseTask& given, int64_t begin,
          int64_t end) {
  for (const bool residual : {false, true}) {
    if (residual && !Op::kAdds) continue;
    for (const bool stream : {false, true}) {
      const auto x = any_values<T>(given.numel), other = any_values<T>(given.numel);
      Buffer<T> y(given.numel, 0);
      ElementwiseTask task = given;
      task.dtype = kDType<T>;
      task.bytes = std::is_same_v<T, uint8_t>;
      task.x = x.data();
      task.y = y.data();
      task.residual = residual ? other.data() : nullptr;
      const auto scales = any_values<compute_t<T>>(given.layer_scale.channels);
      if (given.layer_scale.channels) task.layer_scale.values = scales.data();
      task.stream = stream;
      // As csrc/cpu/elementwise.cpp: whole samples and places, or elements.
      const int64_t unit = task.channels_last ? 1 : 256;
      share_out(begin, end, unit, [&](int64_t from, int64_t to) { leaf(task, from, to); });
      Digest digest;
      digest.add(y);
      digest.report(
          "%s, %s, threshold %u, mask offset %lld, (%lld, %lld)%s%s%s, scale %lld by %lld", name,
          kName<T>, task.threshold, static_cast<long long>(task.mask_offset),
          static_cast<long long>(task.channels), static_cast<long long>(task.length),
          task.channels_last ? " channels_last" : "", residual ? ", residual" : "",
          stream ? ", streamed" : "", static_cast<long long>(task.layer_scale.channels),
          static_cast<long long>(task.layer_scale.inner));
    }
  }
}

void call_leaves() {
  ElementwiseTask task{};
  task.seed = 0x9e3779b97f4a7c15ull;
  task.offset = 0x0000000500000007ull;
  // Between the ends, such that what the draw of element 5 is compared with is itself.
  const RngStream stream(Op::kTag, task.seed, task.offset);
  const uint32_t own = half_word(stream(0), 5);
  for (const uint32_t threshold : {0u, own, own + 1, 65536u}) {
    task.threshold = threshold;
    task.scale = threshold ? 65536.0 / threshold : 0.0;
    // What an op makes of further numbers: whether one is 0, or values.
    task.options[0] = threshold == own ? 0 : 0.25;
    task.options[1] = -1.5;
    task.options[2] = 0.375;
    // A shard can begin anywhere; the last one's groups carry into the counter's second word.
    for (const int64_t offset : {int64_t{0}, int64_t{3}, (int64_t{8} << 32) - 700}) {
      task.mask_offset = offset;
      if constexpr (kTakesBytes<Op>) {
        task.numel = 1501;
        call<uint8_t>("elements_range", RK_LEAF(elements_range<kOpTag>), task, 0, task.numel);
      }
      for_types([&]<typename T>(T) {
        if (has_form<Op>(DrawnFor::element)) {
          task.numel = 1501;
          call<T>("elements_range", RK_LEAF(elements_range<kOpTag>), task, 0, task.numel);
        }
        const auto channels = RK_LEAF(channels_range<kOpTag>);
        task.channels = has_form<Op>(DrawnFor::channel) ? 9 : 1;
        task.length = 47;
        task.numel = 5 * task.channels * task.length;
        call<T>("channels_range", channels, task, 0, task.numel);
        call<T>("channels_range from within", channels, task, 100, task.numel - 9);
        if (kScalesChannels<Op>) {
          for (const int64_t inner : {1, 21, 42, 2100}) {  // in each way that tiles come by them
            task.layer_scale = {nullptr, inner == 21 ? 20 : 4200 / inner, inner};
            task.length = 4200;
            task.numel = 2 * task.length;
            call<T>("channels_range from within", channels, task, 100, task.numel - 9);
          }
          task.layer_scale = {};
        }
        if (has_form<Op>(DrawnFor::channel)) {
          task.channels_last = true;
          call<T>("channels_range", channels, task, 0, 5 * task.length);
          task.channels = 515;
          task.length = 2;
          task.numel = 2 * task.channels * task.length;
          call<T>("channels_range", channels, task, 1, 4);
          task.channels_last = false;
        }
      });
    }
  }
}

}  // namespace isas
