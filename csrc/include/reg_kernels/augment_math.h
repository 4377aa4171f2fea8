// The programs of `augment`: opcodes, what the arguments say, and the arithmetic of one pixel of
// each instruction, for the CPU and the CUDA kernels.
//
// All is float32; each product and each sum is rounded by itself (add_apart), so that every
// implementation has the same bits. Values lie in [0, bound]. reference/augment.py has the same in
// torch, _augment_program.py the same numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "normal.h"
#include "philox.h"

namespace reg_kernels {

// The first element of an instruction.
enum class AugmentOp : int {
  none,
  box,
  warp,
  brightness,
  contrast,
  saturation,
  hue,
  grayscale,
  invert,
  solarize,
  solarize_add,
  posterize,
  autocontrast,
  equalize,
  sharpness,
  blur,
  noise,
  permute,
  erase,
  normalize,
  salt_and_pepper,
  save,
  join,
  mix,
};

constexpr int kAugmentOps = 24;
constexpr int kInstruction = 16;  // elements of an instruction: the opcode and 15 arguments
constexpr int kMostChannels = 4;
constexpr int kMostBlurRadius = 12;
constexpr int kGrays = 256;  // entries of a histogram

enum class AugmentFilter : int { nearest, nearest_exact, bilinear, bicubic };
// `faded` is torchvision's bilinear: the fill's weight is squared, which darkens rims.
enum class WarpFilter : int { nearest, faded, bilinear, bicubic };
enum class AugmentPad : int { none, constant, edge, reflect, symmetric };

constexpr int kLargestSide = 65535;  // of an image, at any point of a program

constexpr int kAntialias = 4;                   // added to a filter's number
constexpr int kFlipColumns = 1, kFlipRows = 2;  // bits of BOX's flips

// The element type of images, before and after.
enum class PixelType : int { bytes, float32, float16, bfloat16 };

// What a call is about: checked, so that kernels may trust it (csrc/torch/augment.h).
struct AugmentBatch {
  const void* pixels;
  int64_t elements;  // of all images
  PixelType from;
  bool channels_last;     // of each image: H x W x C, else C x H x W
  const int64_t* images;  // (N, 3): where each one's elements begin, its height and width
  const float* program;   // (N, S, kInstruction)
  int64_t samples, instructions;
  int channels;
  void* result;  // (N, C, height, width)
  PixelType to;
  bool to_channels_last;
  int height, width;
  bool exact;

  const float* instruction(int64_t sample, int64_t i) const {
    return program + (sample * instructions + i) * kInstruction;
  }
};

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

constexpr RngTag kAugmentTag = rng_tag("augment1");

// What is computed of a pixel is written for F = float and, on CPUs, for vectors of floats, whose
// comparisons and choices read alike. This is what a vector has otherwise.
template <typename F>
struct WholeNumbers;

template <>
struct WholeNumbers<float> {
  static RK_HD float nearest(float x) { return __builtin_rintf(x); }  // half to even
  static RK_HD float below(float x) { return __builtin_floorf(x); }
  // a b + c, rounded once: the product of two floats is a double.
  static RK_HD float product_sum(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) +
                              static_cast<double>(c));
  }
};

template <typename F>
RK_HD F rounded(F x) {
  return WholeNumbers<F>::nearest(x);
}
template <typename F>
RK_HD F floored(F x) {
  return WholeNumbers<F>::below(x);
}
template <typename F>
RK_HD F truncated(F x) {
  return x < 0.0f ? -floored(-x) : floored(x);
}

// a + b or a - b, one of them a product, which is rounded by itself.
template <typename A, typename B>
RK_HD auto plus(A a, B b) {
  if constexpr (sizeof(A) == sizeof(float) && sizeof(B) == sizeof(float)) {
    return add_apart(a, b);
  } else {
    return a + b;
  }
}
template <typename A, typename B>
RK_HD auto minus(A a, B b) {
  return plus(a, -b);
}

// What values lie in, and whether each operation makes them whole numbers (`exact`).
struct ImageRange {
  float bound;  // 255 of bytes, else 1
  bool exact;

  // NaN stays NaN.
  template <typename F>
  RK_HD F clamp(F v) const {
    v = v < 0.0f ? 0.0f : v;
    return v > bound ? bound : v;
  }
  template <typename F>
  RK_HD F clamp_truncated(F v) const {
    const F inside = clamp(v);
    return exact ? floored(inside) : inside;
  }
  // Of what is resampled: floats stay as they are.
  template <typename F>
  RK_HD F resampled(F v) const {
    if (exact) v = rounded(v);
    return bound == 1.0f ? v : clamp(v);
  }
  // a b + c. torchvision has a fused multiply-add here.
  template <typename F>
  RK_HD F product_sum(float a, F b, F c) const {
    return exact ? WholeNumbers<F>::product_sum(a, b, c) : plus(c, a * b);
  }
};

// What a byte stores, as a whole number in [0, 255]; NaN is 0.
template <typename F>
RK_HD F stored_byte(F v) {
  v = rounded(v);
  v = v > 0.0f ? v : 0.0f;
  return v < 255.0f ? v : 255.0f;
}

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

// Colour ---------------------------------------------------------------------------------------

template <typename F>
RK_HD F gray_of(F r, F g, F b, const ImageRange& range) {
  const F gray = range.product_sum(0.114f, b, range.product_sum(0.587f, g, r * 0.2989f));
  return range.exact ? floored(gray) : gray;
}

// A blend of two images. `rest` is 1 - factor before either was rounded.
template <typename F>
RK_HD F blended(F a, F b, float factor, float rest, const ImageRange& range) {
  return range.clamp_truncated(range.product_sum(rest, b, a * factor));
}

// Contrast's mean: of the grays of an image, each as a whole number, which sum up in any order.
RK_HD float gray_unit(const ImageRange& range) {
  return range.exact ? 1.0f : range.bound == 1.0f ? 65536.0f : 256.0f;
}
template <typename F>
RK_HD F counted_gray(F gray, const ImageRange& range) {
  gray = gray > 0.0f ? gray : 0.0f;  // NaN is 0
  gray = gray < range.bound ? gray : range.bound;
  return rounded(gray * gray_unit(range));
}
RK_HD float gray_mean(int64_t sum, int64_t pixels, const ImageRange& range) {
  return static_cast<float>(static_cast<double>(sum) / static_cast<double>(pixels) /
                            static_cast<double>(gray_unit(range)));
}

// Turns the hue of a pixel by `turn` of a whole circle: HSV and back, in torchvision's order.
template <typename F>
RK_HD void turn_hue(F& red, F& green, F& blue, float turn, const ImageRange& range) {
  const float unscale = 1.0f / range.bound;
  const F r = red * unscale, g = green * unscale, b = blue * unscale;
  F most = r > g ? r : g, least = r < g ? r : g;
  most = most > b ? most : b;
  least = least < b ? least : b;
  const F sum = r + g + b;
  most = sum == sum ? most : sum;  // where one of them is NaN all become so
  const F span = most - least;
  const F divisor = most == least ? 1.0f : span;
  const F s = span / (most == least ? 1.0f : most);
  const F rc = (most - r) / divisor, gc = (most - g) / divisor, bc = (most - b) / divisor;
  const F below_red = most == g ? (rc + 2.0f) - bc : (gc + 4.0f) - rc;
  F h = plus((most == r ? bc - gc : below_red) * (1.0f / 6.0f), 1.0f);
  h = h - floored(h);
  h = h + turn;
  h = h - floored(h);
  const F h6 = h * 6.0f, sector = floored(h6), f = minus(h6, sector);
  const ImageRange unit{1.0f, false};
  const F sf = s * f, rest = 1.0f - s;
  const F q = unit.clamp(minus(1.0f, sf) * most);
  const F t = unit.clamp(plus(sf, rest) * most);
  const F p = unit.clamp(rest * most);
  // Of sectors 0 (and 6) to 5 red is v q p p t v, green t v v q p p, blue p p t v v q.
  F x = sector == 1.0f ? q : most;
  x = sector == 2.0f ? p : x;
  x = sector == 3.0f ? p : x;
  x = sector == 4.0f ? t : x;
  F y = sector > 3.0f ? p : t;
  y = sector == 1.0f ? most : y;
  y = sector == 2.0f ? most : y;
  y = sector == 3.0f ? q : y;
  y = sector == 6.0f ? t : y;
  F z = sector == 2.0f ? t : p;
  z = sector == 3.0f ? most : z;
  z = sector == 4.0f ? most : z;
  z = sector == 5.0f ? q : z;
  if (range.exact) {
    red = range.clamp(floored(x * 255.999f));
    green = range.clamp(floored(y * 255.999f));
    blue = range.clamp(floored(z * 255.999f));
  } else {
    red = range.clamp(x * range.bound);
    green = range.clamp(y * range.bound);
    blue = range.clamp(z * range.bound);
  }
}

template <typename F>
RK_HD F solarized(F v, float threshold, const ImageRange& range) {
  return v >= threshold ? range.bound - v : v;
}

template <typename F>
RK_HD F solarize_added(F v, float threshold, float addend, const ImageRange& range) {
  return v < threshold ? range.clamp_truncated(v + addend) : v;
}

// Keeps so many bits of 8.
struct Posterize {
  float to_levels, from_levels;
  bool clamps;
  float most;

  static RK_HD Posterize of(int bits, const ImageRange& range) {
    const float levels = static_cast<float>(1 << bits);
    if (range.bound == 1.0f) return {levels, 1.0f / levels, true, levels - 1.0f};
    return {levels / 256.0f, 256.0f / levels, false, 0.0f};
  }
  template <typename F>
  RK_HD F operator()(F v) const {
    F level = floored(v * to_levels);
    if (clamps) {
      level = level < 0.0f ? 0.0f : level;
      level = level > most ? most : level;
    }
    return level * from_levels;
  }
};

// Stretches [lo, hi], what an image's values that are no NaN lie in, to the whole range.
struct Autocontrast {
  float lo, divisor;
  bool changes;

  static RK_HD Autocontrast of(float lo, float hi, const ImageRange& range) {
    return {lo, (hi - lo) * (1.0f / range.bound), hi > lo};
  }
  template <typename F>
  RK_HD F operator()(F v, const ImageRange& range) const {
    return changes ? range.clamp_truncated((v - lo) / divisor) : v;
  }
};

// A value as one of the levels 0 to 255 of a histogram, NaN as 0; and back.
template <typename F>
RK_HD F gray_level(F v, const ImageRange& range) {
  F level = rounded(v * (255.0f / range.bound));
  level = level > 0.0f ? level : 0.0f;
  return level < 255.0f ? level : 255.0f;
}
RK_HD float of_gray_level(int32_t level, const ImageRange& range) {
  return static_cast<float>(level) * (range.bound / 255.0f);
}

// PIL's table, of the histogram of a channel; false where it changes nothing. `table` may be the
// histogram.
RK_HD bool equalize_table(const int32_t* histogram, int32_t* table) {
  int64_t pixels = 0;
  int32_t last = 0;
  for (int k = 0; k < kGrays; ++k) {
    pixels += histogram[k];
    if (histogram[k]) last = histogram[k];
  }
  const int64_t step = (pixels - last) / 255;
  if (step == 0) return false;
  int64_t below = step / 2;
  for (int k = 0; k < kGrays; ++k) {
    const int64_t level = below / step;
    below += histogram[k];
    table[k] = static_cast<int32_t>(level < 255 ? level : 255);
  }
  return true;
}

// Neighbourhoods -------------------------------------------------------------------------------

// A pixel beside its smoothed value, `sum` of the nine products with these weights in row order.
constexpr float kSmoothSide = 1.0f / 13.0f, kSmoothCentre = 5.0f / 13.0f;
template <typename F>
RK_HD F sharpened(F v, F sum, float rest, const ImageRange& range) {
  const F smooth = range.exact ? rounded(sum) : sum;
  return range.clamp_truncated(range.product_sum(rest, smooth - v, v));
}

struct BlurArguments {
  bool rows, columns;  // whether pixels of several rows, of several columns, are summed
  int radius;
  const float* weights;  // by distance

  static RK_HD BlurArguments of(const float* a) {
    const int axes = static_cast<int>(a[1]);
    return {axes != 1, axes != 2, static_cast<int>(a[2]), a + 3};
  }
};

// Random numbers -------------------------------------------------------------------------------

// The stream of draws whose key is four arguments of 16 bits, the lowest first.
RK_HD RngStream augment_stream(const float* parts) {
  uint64_t key = 0;
  for (int k = 3; k >= 0; --k) key = key << 16 | static_cast<uint64_t>(parts[k]);
  return {kAugmentTag, key, 0};
}

// The normal number of an element of an image: of word e % 4 of group e / 4.
RK_HD float augment_normal(const RngStream& stream, int64_t element) {
  const PhiloxWords words = stream(static_cast<uint64_t>(element) / 4);
  const int pair = static_cast<int>(element & 2);
  const auto normals = normal_pair<OneLane>(words.w[pair], words.w[pair + 1]);
  return element & 1 ? normals.second : normals.first;
}

struct NoiseArguments {
  float mean, std;
  bool clip;

  static RK_HD NoiseArguments of(const float* a) { return {a[1], a[2], a[3] != 0.0f}; }
  static RK_HD const float* key(const float* a) { return a + 4; }

  template <typename F>
  RK_HD F operator()(F v, F normal, const ImageRange& range) const {
    const F noise = plus(normal * std, mean);
    if (range.exact) return range.clamp(v + truncated(noise));
    const F noisy = v + noise;
    return clip ? range.clamp(noisy) : noisy;
  }
};

struct EraseArguments {
  int top, left, height, width;
  bool normal;  // a normal number for each element, or a value for each channel
  const float* values;
  const float* key;

  static RK_HD EraseArguments of(const float* a) {
    return {static_cast<int>(a[1]),
            static_cast<int>(a[2]),
            static_cast<int>(a[3]),
            static_cast<int>(a[4]),
            a[5] != 0.0f,
            a + 6,
            a + 10};
  }
};

// A share of all elements is one of both ends of the range.
struct SaltAndPepperArguments {
  float share, salt;  // as multiples of 1/65536

  static RK_HD SaltAndPepperArguments of(const float* a) {
    const double p = a[1], salt = a[2];
    return {static_cast<float>(rint(p * 65536.0) / 65536.0),
            static_cast<float>(rint(p * salt * 65536.0) / 65536.0)};
  }
  static RK_HD const float* key(const float* a) { return a + 3; }

  // Of a half-word's value.
  template <typename F>
  RK_HD F operator()(F v, F half_word, const ImageRange& range) const {
    const F u = half_word * 0x1p-16f;
    const F impulse = u < salt ? half_word * 0.0f + range.bound : half_word * 0.0f;
    return u < share ? impulse : v;
  }
};

RK_NAMESPACE_END
