// BOX and WARP, the instructions of `augment` that move pixels: where each one comes from, and what
// the pixels around that place count for.
#pragma once

#include "augment_values.h"

RK_NAMESPACE_BEGIN

// BOX ------------------------------------------------------------------------------------------

struct BoxArguments {
  int top, left, height, width, out_height, out_width;
  bool flip_rows, flip_columns;
  AugmentFilter filter;
  bool antialias;
  AugmentPad pad;
  const float* fill;  // of each channel

  static RK_HD BoxArguments of(const float* a) {
    const int flips = static_cast<int>(a[7]), filter = static_cast<int>(a[8]);
    return {static_cast<int>(a[1]),
            static_cast<int>(a[2]),
            static_cast<int>(a[3]),
            static_cast<int>(a[4]),
            static_cast<int>(a[5]),
            static_cast<int>(a[6]),
            (flips & kFlipRows) != 0,
            (flips & kFlipColumns) != 0,
            static_cast<AugmentFilter>(filter & (kAntialias - 1)),
            (filter & kAntialias) != 0,
            static_cast<AugmentPad>(static_cast<int>(a[9])),
            a + 10};
  }
};

// Where index g of an image's side lies, or -1: there is fill.
RK_HD int padded_index(int g, int side, AugmentPad pad) {
  if (g >= 0 && g < side) return g;
  switch (pad) {
    case AugmentPad::none:
    case AugmentPad::constant: return -1;
    case AugmentPad::edge: return g < 0 ? 0 : side - 1;
    case AugmentPad::reflect: {
      if (side == 1) return 0;
      const int period = 2 * (side - 1), j = (g < 0 ? -g : g) % period;
      return j >= side ? period - j : j;
    }
    case AugmentPad::symmetric: break;
  }
  const int period = 2 * side, rest = g % period, j = rest < 0 ? rest + period : rest;
  return j >= side ? period - 1 - j : j;
}

// The cubic kernel of parameter a at x >= 0, up to 1 and from there to 2.
template <typename F>
RK_HD F cubic_near(F x, float a) {
  return plus(minus((a + 2.0f) * x, a + 3.0f) * x * x, 1.0f);
}
template <typename F>
RK_HD F cubic_far(F x, float a) {
  const F inner = minus(a * x, 5.0f * a);
  return minus(plus(inner * x, 8.0f * a) * x, 4.0f * a);
}

// The four weights at the fraction t, without antialiasing.
template <typename F>
struct CubicWeights {
  F w[4];

  static RK_HD CubicWeights of(F t) {
    constexpr float a = -0.75f;
    return {{cubic_far(t + 1.0f, a), cubic_near(t, a), cubic_near(1.0f - t, a),
             cubic_far(2.0f - t, a)}};
  }
};

// One axis of BOX: `length` places of a region, resampled to `out`.
struct BoxAxis {
  int length, out;
  bool flip;
  AugmentFilter filter;
  bool antialias;
  float scale, margin;  // source places an output place; of what an antialiasing filter is wide

  static RK_HD BoxAxis of(int length, int out, bool flip, AugmentFilter filter, bool antialias) {
    const float scale = static_cast<float>(length) / static_cast<float>(out);
    return {length, out, flip, filter, antialias, scale, scale > 1.0f ? scale : 1.0f};
  }

  RK_HD bool copies() const { return length == out; }
  // Whether each place has one tap, whose weight is 1.
  RK_HD bool takes_one() const {
    return copies() || filter == AugmentFilter::nearest || filter == AugmentFilter::nearest_exact;
  }
  RK_HD float half() const { return (filter == AugmentFilter::bilinear ? 1.0f : 2.0f) * margin; }
  // No place has more taps.
  RK_HD int most_taps() const {
    if (takes_one()) return 1;
    if (!antialias) return filter == AugmentFilter::bilinear ? 2 : 4;
    const int most = static_cast<int>(2.0f * half()) + 2;
    return most < length ? most : length;
  }

  RK_HD int place(int i) const { return flip ? out - 1 - i : i; }
  // Where an output place, turned round already, lies in the region.
  template <typename F>
  RK_HD F centre_of(F place) const {
    return scale * (place + 0.5f);
  }
  RK_HD float centre(int i) const { return centre_of(static_cast<float>(place(i))); }
  RK_HD int inside(int k) const { return k < 0 ? 0 : k < length ? k : length - 1; }

  // The one tap's place, counted from the region's start.
  RK_HD int one(int i) const {
    if (copies()) return place(i);
    const float at =
        static_cast<float>(place(i)) + (filter == AugmentFilter::nearest_exact ? 0.5f : 0.0f);
    return inside(static_cast<int>(scale * at));
  }

  // Without antialiasing: the first of 2 or 4 taps, of which each is to be taken `inside`, and
  // where between the middle ones the centre lies.
  struct Between {
    int first;
    float fraction;
  };
  RK_HD Between between(int i) const {
    const float centre = minus(this->centre(i), 0.5f);
    if (filter == AugmentFilter::bilinear) {
      const float at = centre > 0.0f ? centre : 0.0f;
      const int first = inside(static_cast<int>(at));
      return {first, at - static_cast<float>(first)};
    }
    const float below = floored(centre);
    return {static_cast<int>(below) - 1, centre - below};
  }

  // With antialiasing: taps [first, first + count), each with unscaled_weight / its sum over them
  // in order.
  struct Span {
    int first, count;
    float centre;
  };
  RK_HD Span span(int i) const {
    const float centre = this->centre(i), half = this->half();
    const int first = inside(static_cast<int>(plus(minus(centre, half), 0.5f)));
    const int end = static_cast<int>(plus(plus(centre, half), 0.5f));
    return {first, (end < length ? end : length) - first, centre};
  }
  template <typename F>
  RK_HD F unscaled_weight(F tap, F centre) const {
    const F at = plus(minus(tap, centre), 0.5f) / margin;
    const F x = at < 0.0f ? -at : at;
    if (filter == AugmentFilter::bilinear) return x < 1.0f ? 1.0f - x : x * 0.0f;
    constexpr float a = -0.5f;
    const F far = x < 2.0f ? cubic_far(x, a) : x * 0.0f;
    return x < 1.0f ? cubic_near(x, a) : far;
  }
  RK_HD float unscaled_weight(const Span& span, int j) const {
    return unscaled_weight(static_cast<float>(span.first + j), span.centre);
  }

  // The taps of place i, whatever the filter: calls f(j, k, weight) for the place k of each.
  template <typename F>
  RK_HD void for_taps(int i, const F& f) const {
    if (takes_one()) return f(0, one(i), 1.0f);
    if (antialias) {
      const Span span = this->span(i);
      float total = 0.0f;
      for (int j = 0; j < span.count; ++j) total = total + unscaled_weight(span, j);
      for (int j = 0; j < span.count; ++j) f(j, span.first + j, unscaled_weight(span, j) / total);
      return;
    }
    const Between at = between(i);
    if (filter == AugmentFilter::bilinear) {
      f(0, at.first, 1.0f - at.fraction);
      f(1, inside(at.first + 1), at.fraction);
      return;
    }
    const auto weights = CubicWeights<float>::of(at.fraction);
    for (int j = 0; j < 4; ++j) f(j, inside(at.first + j), weights.w[j]);
  }
  // Where they begin. The first and the last ones of some filters lie beside the region; what is
  // taken for them is the place nearest to them, `inside`.
  RK_HD int first_tap(int i) const {
    return takes_one() ? one(i) : antialias ? span(i).first : between(i).first;
  }
};

// WARP -----------------------------------------------------------------------------------------

struct WarpArguments {
  float m[9];
  int out_height, out_width;
  WarpFilter filter;
  const float* fills;

  static RK_HD WarpArguments of(const float* a) {
    return {{a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]},
            static_cast<int>(a[10]),
            static_cast<int>(a[11]),
            static_cast<WarpFilter>(static_cast<int>(a[12])),
            a + 13};
  }
  RK_HD bool affine() const { return m[6] == 0.0f && m[7] == 0.0f && m[8] == 1.0f; }
  RK_HD float fill(int c) const { return fills[c < 2 ? c : 2]; }
};

// Where in the image, in indices, output pixel (y, x) lies.
template <typename F>
struct WarpPoint {
  F x, y;
};

struct WarpPlaces {
  const float* m;
  bool affine, exact;
  float centre_x, centre_y, half_width, half_height;

  // For an image of height x width.
  static RK_HD WarpPlaces of(const WarpArguments& warp, int height, int width, bool exact) {
    return {warp.m,
            warp.affine(),
            exact,
            0.5f * static_cast<float>(warp.out_width),
            0.5f * static_cast<float>(warp.out_height),
            0.5f * static_cast<float>(width),
            0.5f * static_cast<float>(height)};
  }

  // With `exact` in torchvision's steps, by a matrix to its grid, where the image is from -1 to 1,
  // and for an affine one from the centre of the result.
  template <typename F>
  RK_HD WarpPoint<F> operator()(F x, F y) const {
    x = x + 0.5f;
    y = y + 0.5f;
    if (exact && affine) {
      x = x - centre_x;
      y = y - centre_y;
    }
    F u = plus(plus(x * m[0], y * m[1]), m[2]);
    F v = plus(plus(x * m[3], y * m[4]), m[5]);
    if (!affine) {
      const F q = plus(plus(x * m[6], y * m[7]), m[8]);
      u = u / q;
      v = v / q;
    }
    if (exact) {
      if (!affine) {
        u = u - 1.0f;
        v = v - 1.0f;
      }
      u = (u + 1.0f) * half_width;
      v = (v + 1.0f) * half_height;
    }
    return {minus(u, 0.5f), minus(v, 0.5f)};
  }
};

// Places further away, and NaN, are fill, whatever the filter.
constexpr float kNear = 0x1p30f;

// A pixel between four: `p` in row order, fill where there is none.
template <typename F>
RK_HD F between_four(const F (&p)[4], F wx, F wy) {
  const F left = 1.0f - wx, above = 1.0f - wy;
  const F top = plus(p[0] * left, p[1] * wx), bottom = plus(p[2] * left, p[3] * wx);
  return plus(top * above, bottom * wy);
}

// The same by WarpFilter::faded: `p` and `in` are 0 where there is none, else `in` is 1.
template <typename F>
RK_HD F between_four_faded(const F (&p)[4], const F (&in)[4], F wx, F wy, float fill) {
  const F left = 1.0f - wx, above = 1.0f - wy;
  const F w[4] = {above * left, above * wx, wy * left, wy * wx};
  F value = p[0] * w[0], mask = in[0] * w[0];
  for (int k = 1; k < 4; ++k) {
    value = plus(value, p[k] * w[k]);
    mask = plus(mask, in[k] * w[k]);
  }
  return plus((value - fill) * mask, fill);
}

RK_NAMESPACE_END
