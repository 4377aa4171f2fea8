// Calls the leaves of csrc/cpu/mixup.simd.cpp.
#include "cpu/mixup.h"

#include "isas.h"

namespace isas {

constexpr int64_t kSamples = 5, kChannels = 3, kHeight = 17, kWidth = 19;
constexpr int64_t kLength = kHeight * kWidth, kNumel = kChannels * kLength;

// Each sample has another weight: between the ends, and both of them.
const double kLams[kSamples] = {0.3, 1.0, 0.5, 0.0, 0.8};
const int64_t kIndex[kSamples] = {2, 0, 3, 1, 4};
const int64_t kOrder[kSamples] = {0, 2, 3, 1, 4};
const int64_t kBoxes[4 * kSamples] = {1,  2,  9, 11, 0, 0, 0, 0, 3,  0,
                                      19, 17, 5, 5,  6, 6, 0, 0, 19, 1};

enum class Scaled { no, by_channel, by_element };

template <typename From, typename To>
struct Batch {
  using C = std::conditional_t<sizeof(From) == 8 || sizeof(To) == 8, double, float>;

  MixupTask task{};
  Buffer<From> x;
  Buffer<To> y;
  Buffer<C> scale, shift;
  std::string name;

  // `turns`: the output is in the other layout.
  Batch(bool channels_last, bool turns, bool boxes, bool stream, Scaled scaled)
      : x(kSamples * kNumel, 0),
        y(kSamples * kNumel, 0),
        scale(numbers<C>(2 * kNumel)),
        shift(numbers<C>(2 * kNumel)) {
    if constexpr (std::is_same_v<From, uint8_t>) {
      for (int64_t i = 0; i < x.size(); ++i) x.data()[i] = static_cast<uint8_t>(below(256));
    } else {
      x = any_values<From>(x.size());
    }
    task.x = x.data();
    task.y = y.data();
    task.from = std::is_same_v<From, uint8_t> ? kBytes : static_cast<int>(kDType<From>);
    task.to = kDType<To>;
    task.in_double = sizeof(C) == 8;
    const ChannelValues lam{const_cast<double*>(kLams), DType::float64};
    task.blend = {kSamples, kHeight, kWidth, lam, false, 0.0, kIndex, boxes ? kBoxes : nullptr,
                  false};
    task.layout = {kChannels, kLength, channels_last};
    task.to_channels_last = channels_last != turns;
    task.numel = kNumel;
    task.tile = turns ? 100 : 512;
    task.tiles = ceil_div(turns ? kLength : kNumel, task.tile);
    task.stream = stream;
    task.order = kOrder;
    if (scaled != Scaled::no) {
      task.constant = scaled == Scaled::by_channel;
      task.scale = scale.data();
      task.shift = shift.data();
      const int64_t repeat = task.to_channels_last || task.constant ? 1 : kLength;
      for (int64_t i = 2 * kNumel; i-- > 0;) {
        scale.data()[i] = scale.data()[i / repeat % kChannels];
        shift.data()[i] = shift.data()[i / repeat % kChannels];
      }
    }
    name = std::string(kName<From>) + " to " + kName<To> +
           (channels_last ? ", channels_last" : ", channels first") + (turns ? ", turned" : "") +
           (boxes ? ", boxes" : "") + (stream ? ", streamed" : "") +
           (scaled == Scaled::no ? ""
            : task.constant      ? ", scaled by channel"
                                 : ", scaled");
  }

  void report(const char* leaf) const {
    Digest digest;
    digest.add(y);
    digest.report("%s, %s", leaf, name.c_str());
  }
};

template <typename From, typename To>
void call() {
  for (const bool turns : {false, true}) {
    for (const bool channels_last : {false, true}) {
      for (const Scaled scaled : {Scaled::no, Scaled::by_channel, Scaled::by_element}) {
        if (scaled == Scaled::by_channel && channels_last != turns) continue;
        const bool boxes = scaled == Scaled::no, stream = scaled == Scaled::by_element;
        Batch<From, To> batch(channels_last, turns, boxes, stream, scaled);
        const MixupTask& task = batch.task;
        const int64_t items = kSamples * task.tiles;
        share_out(0, items, 1,
                  [&](int64_t begin, int64_t end) { RK_LEAF(mixup_range)(task, begin, end); });
        batch.report("mixup_range");
        if constexpr (!std::is_same_v<From, uint8_t>) {
          share_out(0, items, 1, [&](int64_t begin, int64_t end) {
            RK_LEAF(mixup_backward_range)(task, begin, end);
          });
          batch.report("mixup_backward_range");
        }
        if constexpr (std::is_same_v<From, To>) {
          if (turns) continue;
          std::memcpy(batch.y.data(), batch.x.data(), kSamples * kNumel * sizeof(From));
          MixupTask own = task;
          own.x = own.y;
          own.stream = false;
          share_out(0, task.tiles, 1, [&](int64_t begin, int64_t end) {
            double saved[512];
            RK_LEAF(mixup_cycle)(own, kOrder, 4, saved, begin, end);
          });
          batch.report("mixup_cycle");
        }
      }
    }
  }
}

void call_leaves() {
  for_types([]<typename T>(T) {
    for_types([]<typename To>(To) { call<T, To>(); });
    call<uint8_t, T>();
  });
}

}  // namespace isas
