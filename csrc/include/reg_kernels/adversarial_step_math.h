// One element of an adversarial step, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace reg_kernels {

// Of the ball around the clean input, numbered as in reg_kernels/ops/adversarial_step.py.
enum class BallNorm { linf, l1, l2 };

// What becomes of a sample's displacement: nothing, or what SampleMove has for L2 or L1.
enum class BroughtBack { not_at_all, by_factor, by_threshold };

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

// A number of each sample, of one for all, or `otherwise`.
struct SampleNumbers {
  const double* values;  // or null
  bool one_for_all;
  double otherwise;

  RK_HD double at(int64_t n) const {
    return values == nullptr ? otherwise : values[one_for_all ? 0 : n];
  }
};

// The numbers of a channel: times `scale` a difference of inputs is one of pixels, times `inverse`
// that one is the input's again; between the bounds lies what is a pixel.
template <typename C>
struct ChannelNumbers {
  C scale, inverse, lower, upper;
};

// What holds for a sample. In L1 and L2 a step is `length` times the gradient; what then lies
// between it and the clean input is brought into the ball by `threshold` and `factor`.
struct SampleMove {
  double length, eps;
  double threshold = 0, factor = 1;
  bool inside = true;  // nothing has to be brought back

  // A radius below 0, or NaN, which nobody has looked at on a GPU, is none.
  static RK_HD SampleMove of(double step_size, double eps) {
    return {step_size, eps > 0 ? eps : 0};
  }

  // By the gradient's norm: a step of `step_size` in the norm. A gradient of 0 makes none.
  RK_HD void set_gradient(double norm) { length /= norm > 1e-30 ? norm : 1e-30; }

  // Brings a displacement whose norm is that into the ball of L2.
  RK_HD void shorten(double norm) {
    if (!(norm > eps)) return;
    factor = eps / norm;
    inside = false;
  }

  // Likewise of L1: `count` of its elements are above the threshold, and their absolute values add
  // up to `sum`. Returns whether the threshold is found; else both are counted again by the new
  // one. That is Newton's method from below on a convex function of straight pieces, which ends
  // at the exact threshold: each turn leaves out an element at least. C. Michelot, "A finite
  // algorithm for finding the projection of a point onto the canonical simplex of R^n", 1986.
  RK_HD bool shrink(double sum, int64_t count, int64_t before) {
    if (inside && !(sum > eps)) return true;
    if (count == 0 || (!inside && count == before)) return true;
    threshold = (sum - eps) / static_cast<double>(count);
    inside = false;
    return false;
  }
};

template <typename C>
RK_HD C clamped(C value, C lower, C upper) {
  value = value < lower ? lower : value;
  return value > upper ? upper : value;
}

// A NaN among the gradients moves nothing; one in adv or clean stays.
template <typename C>
RK_HD C linf_step(C adv, C grad, C clean, C step_size, C eps, C lower, C upper) {
  // Of two choices, since a compiler makes a branch of one within another.
  const C up = grad > C(0) ? step_size : C(0), down = grad < C(0) ? step_size : C(0);
  const C moved = adv + (up - down);
  const C near = clamped(moved, add_apart(clean, -eps), add_apart(clean, eps));
  const C value = clamped(near, lower, upper);
  return clean == clean ? value : clean;
}

// By pixels. A gradient that is not finite counts as 0.
template <typename C>
RK_HD C pixel_gradient(C grad, C inverse) {
  return grad - grad == C(0) ? grad * inverse : C(0);
}

// From clean to where the step leads, in pixels.
template <typename C>
RK_HD C displacement(C adv, C grad, C clean, C length, ChannelNumbers<C> of) {
  return (adv - clean) * of.scale + length * pixel_gradient(grad, of.inverse);
}

// What counts of a displacement or a gradient in a sum of squares, or of absolute values above a
// threshold. NaN is left out: it says nothing of the other elements.
template <BallNorm kNorm, typename C>
RK_HD C counted(C value, C threshold) {
  if constexpr (kNorm == BallNorm::l2) return value == value ? value : C(0);
  const C magnitude = value < C(0) ? -value : value;
  return magnitude > threshold ? magnitude : C(0);
}

// A SampleMove's numbers in the type that is computed in.
template <typename C>
struct BallMove {
  C length, threshold, factor;
  bool inside;

  static RK_HD BallMove of(const SampleMove& move) {
    return {static_cast<C>(move.length), static_cast<C>(move.threshold),
            static_cast<C>(move.factor), move.inside};
  }
};

// One way for a whole sample: what one way alone reads would be read under a condition.
template <BroughtBack kHow, typename C>
RK_HD C ball_step(C adv, C grad, C clean, const BallMove<C>& move, ChannelNumbers<C> of) {
  const C step = move.length * pixel_gradient(grad, of.inverse);
  C value;
  if constexpr (kHow == BroughtBack::not_at_all) {
    value = adv + step * of.inverse;
  } else {
    C way = (adv - clean) * of.scale + step;
    if constexpr (kHow == BroughtBack::by_factor) {
      way *= move.factor;
    } else {
      const C above = way > C(0) ? way - move.threshold : way + move.threshold;
      way = (way <= move.threshold) & (way >= -move.threshold) ? C(0) : above;
    }
    value = clean + way * of.inverse;
  }
  value = clamped(value, of.lower, of.upper);
  return clean == clean ? value : clean;
}

// 16 bits as a number that grows with the float, and back.
RK_HD int32_t in_order(uint16_t bits) {
  const int32_t magnitude = bits & 0x7fff;
  return bits & 0x8000 ? -magnitude : magnitude;
}

RK_HD uint16_t next_towards(uint16_t bits, uint16_t target) {
  const int32_t from = in_order(bits), to = in_order(target);
  const int32_t next = from + (from < to ? 1 : 0) - (from > to ? 1 : 0);
  return static_cast<uint16_t>(next < 0 ? 0x8000 - next : next);
}

// The bits of a rounded number, `wide`: or, where that is further than `most` from clean, those of
// the next one towards clean, which no longer is.
RK_HD uint16_t kept_within(uint16_t rounded, float wide, uint16_t clean, float wide_clean,
                           float most) {
  const float distance = wide - wide_clean;
  const bool is_far = (distance > most) | (distance < -most);
  return is_far ? next_towards(rounded, clean) : rounded;
}

// `value`, which lies in the ball around clean, rounded to a T that does. In L-infinity it is
// rounded to nearest, unless that is further away than eps. In L1 and L2 a rounding may bring no
// element further away: the errors of all of them add up.
template <typename T>
RK_HD T store_within(compute_t<T> value, T clean, compute_t<T> eps, bool linf) {
  const T rounded = store<T>(value);
  if constexpr (sizeof(T) == 2) {
    const float own = load(clean), away = value < own ? own - value : value - own;
    return {kept_within(rounded.bits, load(rounded), clean.bits, own, linf ? eps : away)};
  } else {
    return rounded;
  }
}

RK_NAMESPACE_END
