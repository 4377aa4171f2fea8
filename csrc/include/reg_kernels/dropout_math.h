// A probability as the kernels use it, and a walk through channels; shared by CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "channel_layout.h"

RK_NAMESPACE_BEGIN

// The name of an argument that is a number, and the ends of its range.
struct Number {
  const char* name;
  double least, most;
};

constexpr Number kProbability = {"p", 0.0, 1.0};
constexpr Number kDeviation = {"std", 0.0, 1.7976931348623157e308};  // any finite one

// A probability as the kernels use it: keep iff half-word < threshold, scale by 65536 / threshold,
// so that the expectation is exact for the probability that is realised, 1 - threshold / 65536.
// `scale` is rounded once to the compute type by its user. Both are 0 when everything is dropped.
struct DropoutRate {
  uint32_t threshold;  // 0 to 65536
  double scale;

  // p outside [0, 1], or NaN, counts as the nearest end: on the device nobody can refuse it.
  static RK_HD DropoutRate from_probability(double p) {
    const double keep = p >= 0.0 ? (p <= 1.0 ? 1.0 - p : 0.0) : 1.0;
    const auto threshold = static_cast<uint32_t>(nearbyint(keep * 65536.0));
    return {threshold, threshold ? 65536.0 / threshold : 0.0};
  }
};

// Channel dropout draws once a channel. This walks the mask index n * C + c along memory, with two
// divisions at the start and none after it. Index is 32 bits wide where the tensor allows it: a GPU
// divides those several times faster.
template <typename Index>
class ChannelCursor {
 public:
  RK_HD ChannelCursor(const ChannelLayout& layout, Index element)
      : channels_(static_cast<Index>(layout.channels)),
        length_(static_cast<Index>(layout.length)),
        channels_last_(layout.channels_last) {
    if (channels_last_) {
      const Index position = element / channels_;
      channel_ = element % channels_;
      step_ = position % length_;
      mask_index_ = position / length_ * channels_ + channel_;
    } else {
      channel_ = 0;
      step_ = element % length_;
      mask_index_ = element / length_;
    }
  }

  RK_HD Index mask_index() const { return mask_index_; }

  // How many elements from here on lie in one channel, or one beside the other in their channels.
  RK_HD Index run() const { return channels_last_ ? channels_ - channel_ : length_ - step_; }

  RK_HD void advance() {
    if (channels_last_) {
      ++mask_index_;
      if (++channel_ < channels_) return;
      channel_ = 0;
      if (++step_ < length_) {
        mask_index_ -= channels_;  // the next position has the same channels
      } else {
        step_ = 0;  // the next sample
      }
    } else if (++step_ == length_) {
      step_ = 0;
      ++mask_index_;
    }
  }

 private:
  Index channels_, length_;
  Index channel_, step_;
  Index mask_index_;
  bool channels_last_;
};

RK_NAMESPACE_END
