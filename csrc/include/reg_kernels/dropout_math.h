// One element's dropout, shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "philox.h"

RK_NAMESPACE_BEGIN

// A probability as the kernels use it: keep iff half-word < threshold, scale by 65536 / threshold,
// so that the expectation is exact for the probability that is realised, 1 - threshold / 65536.
// `scale` is rounded once to the compute type by its user. Both are 0 when everything is dropped.
struct DropoutRate {
  uint32_t threshold;  // 0 to 65536
  double scale;

  static RK_HD DropoutRate from_probability(double p) {
    const auto threshold = static_cast<uint32_t>(nearbyint((1.0 - p) * 65536.0));
    return {threshold, threshold ? 65536.0 / threshold : 0.0};
  }
};

// A dropped element is multiplied by zero, not replaced by it: NaN, Inf and the sign of zero come
// out as torch's do.
template <typename T>
RK_HD T dropout_element(T x, bool keep, compute_t<T> scale) {
  return store<T>(load(x) * (keep ? scale : compute_t<T>(0)));
}

// Channel dropout draws once a channel. A dense (N, C, L) tensor lies in memory with the channel's
// L values together (channels first), or with the C channels of a position together (channels
// last).
struct ChannelLayout {
  int64_t channels;  // C
  int64_t length;    // L, the product of the spatial sizes
  bool channels_last;
};

// Walks the mask index n * C + c along memory, with two divisions at the start and none after it.
struct ChannelCursor {
  int64_t mask_index;

  RK_HD ChannelCursor(const ChannelLayout& layout, int64_t element) : layout_(layout) {
    if (layout.channels_last) {
      const int64_t position = element / layout.channels;
      channel_ = element % layout.channels;
      step_ = position % layout.length;
      mask_index = position / layout.length * layout.channels + channel_;
    } else {
      mask_index = element / layout.length;
      step_ = element % layout.length;
      channel_ = 0;
    }
  }

  RK_HD void advance() {
    if (layout_.channels_last) {
      ++mask_index;
      if (++channel_ < layout_.channels) return;
      channel_ = 0;
      if (++step_ < layout_.length) {
        mask_index -= layout_.channels;  // the next position has the same channels
      } else {
        step_ = 0;  // the next sample
      }
    } else if (++step_ == layout_.length) {
      step_ = 0;
      ++mask_index;
    }
  }

 private:
  const ChannelLayout& layout_;
  int64_t channel_;
  int64_t step_;
};

RK_NAMESPACE_END
