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
enum class AugmentPad : int { none, constant, edge, reflect, symmetric };

constexpr int kAntialias = 4;                   // added to a filter's number
constexpr int kFlipColumns = 1, kFlipRows = 2;  // bits of BOX's flips

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

constexpr RngTag kAugmentTag = rng_tag("augment1");

// Rounding to whole numbers. Where there is an instruction for vectors the compiler finds it; where
// there is none a library's function would keep a loop from becoming vector code, and sums with
// 2^23, which leave no bits for a fraction, have the same results.
#if defined(__CUDA_ARCH__) || defined(__SSE4_1__) || defined(__aarch64__)
RK_HD float rounded(float x) { return __builtin_rintf(x); }
RK_HD float floored(float x) { return __builtin_floorf(x); }
#else
RK_HD float rounded(float x) {
  const float magnitude = __builtin_fabsf(x);
  const float whole = magnitude < 0x1p23f ? (magnitude + 0x1p23f) - 0x1p23f : magnitude;
  return __builtin_copysignf(whole, x);
}
RK_HD float floored(float x) {
  const float whole = rounded(x);
  return whole > x ? whole - 1.0f : whole;
}
#endif
RK_HD float truncated(float x) { return __builtin_copysignf(floored(__builtin_fabsf(x)), x); }

// a - b, with a or b a product.
RK_HD float subtract_apart(float a, float b) { return add_apart(a, -b); }

// What values lie in, and whether each operation makes them whole numbers (`exact`).
struct ImageRange {
  float bound;  // 255 of bytes, else 1
  bool exact;

  RK_HD float clamp(float v) const { return v < 0.0f ? 0.0f : v > bound ? bound : v; }
  // NaN stays NaN in both.
  RK_HD float clamp_truncated(float v) const {
    const float inside = clamp(v);
    return exact ? floored(inside) : inside;
  }
  RK_HD float clamp_rounded(float v) const { return clamp(exact ? rounded(v) : v); }
};

RK_HD uint8_t stored_byte(float v) {
  const float whole = rounded(v);
  return static_cast<uint8_t>(whole > 0.0f ? (whole < 255.0f ? whole : 255.0f) : 0.0f);
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
RK_HD float cubic_near(float x, float a) {
  return add_apart(subtract_apart((a + 2.0f) * x, a + 3.0f) * x * x, 1.0f);
}
RK_HD float cubic_far(float x, float a) {
  const float inner = subtract_apart(a * x, 5.0f * a);
  return subtract_apart(add_apart(inner * x, 8.0f * a) * x, 4.0f * a);
}

// The four weights at the fraction t, without antialiasing.
struct CubicWeights {
  float w[4];

  static RK_HD CubicWeights of(float t) {
    constexpr float a = -0.75f;
    const float rest = 1.0f - t;
    return {
        {cubic_far(t + 1.0f, a), cubic_near(t, a), cubic_near(rest, a), cubic_far(2.0f - t, a)}};
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
  RK_HD float centre(int i) const { return scale * (static_cast<float>(place(i)) + 0.5f); }
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
    const float centre = subtract_apart(this->centre(i), 0.5f);
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
    const int first = inside(static_cast<int>(add_apart(subtract_apart(centre, half), 0.5f)));
    const int end = static_cast<int>(add_apart(add_apart(centre, half), 0.5f));
    return {first, (end < length ? end : length) - first, centre};
  }
  RK_HD float unscaled_weight(const Span& span, int j) const {
    const float at =
        add_apart(subtract_apart(static_cast<float>(span.first + j), span.centre), 0.5f) / margin;
    const float x = at < 0.0f ? -at : at;
    if (filter == AugmentFilter::bilinear) return x < 1.0f ? 1.0f - x : 0.0f;
    constexpr float a = -0.5f;
    return x < 1.0f ? cubic_near(x, a) : x < 2.0f ? cubic_far(x, a) : 0.0f;
  }

  // The taps of place i, whatever the filter: calls f(j, k, weight) for the place k of each.
  template <typename F>
  RK_HD void for_taps(int i, const F& f) const {
    if (takes_one()) return f(0, one(i), 1.0f);
    if (antialias) {
      const Span span = this->span(i);
      float total = 0.0f;
      for (int j = 0; j < span.count; ++j) total = add_apart(total, unscaled_weight(span, j));
      for (int j = 0; j < span.count; ++j) f(j, span.first + j, unscaled_weight(span, j) / total);
      return;
    }
    const Between at = between(i);
    if (filter == AugmentFilter::bilinear) {
      f(0, at.first, 1.0f - at.fraction);
      f(1, inside(at.first + 1), at.fraction);
      return;
    }
    const CubicWeights weights = CubicWeights::of(at.fraction);
    for (int j = 0; j < 4; ++j) f(j, inside(at.first + j), weights.w[j]);
  }
};

// WARP -----------------------------------------------------------------------------------------

struct WarpArguments {
  float m[9];
  int out_height, out_width;
  AugmentFilter filter;
  const float* fills;

  static RK_HD WarpArguments of(const float* a) {
    return {{a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]},
            static_cast<int>(a[10]),
            static_cast<int>(a[11]),
            static_cast<AugmentFilter>(static_cast<int>(a[12])),
            a + 13};
  }
  RK_HD bool affine() const { return m[6] == 0.0f && m[7] == 0.0f && m[8] == 1.0f; }
  RK_HD float fill(int c) const { return fills[c < 2 ? c : 2]; }
};

// Where in the image, in indices, output pixel (y, x) lies.
struct WarpPoint {
  float x, y;
};
RK_HD WarpPoint warp_point(const float* m, bool affine, float x, float y) {
  const float X = x + 0.5f, Y = y + 0.5f;
  float u = add_apart(add_apart(m[0] * X, m[1] * Y), m[2]);
  float v = add_apart(add_apart(m[3] * X, m[4] * Y), m[5]);
  if (!affine) {
    const float q = add_apart(add_apart(m[6] * X, m[7] * Y), m[8]);
    u = u / q;
    v = v / q;
  }
  return {subtract_apart(u, 0.5f), subtract_apart(v, 0.5f)};
}

// Whether a whole number, NaN and infinities among them, is an index of a side.
RK_HD bool is_index(float k, int side) { return k >= 0.0f && k <= static_cast<float>(side - 1); }

// A pixel between four: `p` in row order, fill where there is none.
RK_HD float between_four(const float (&p)[4], float wx, float wy) {
  const float left = 1.0f - wx, above = 1.0f - wy;
  const float top = add_apart(p[0] * left, p[1] * wx), bottom = add_apart(p[2] * left, p[3] * wx);
  return add_apart(top * above, bottom * wy);
}

// The same as torchvision has it: `p` 0 and `in` 0 where there is none, else `in` 1.
RK_HD float between_four_masked(const float (&p)[4], const float (&in)[4], float wx, float wy,
                                float fill) {
  const float left = 1.0f - wx, above = 1.0f - wy;
  const float w[4] = {left * above, wx * above, left * wy, wx * wy};
  float value = w[0] * p[0], mask = w[0] * in[0];
  for (int k = 1; k < 4; ++k) {
    value = add_apart(value, w[k] * p[k]);
    mask = add_apart(mask, w[k] * in[k]);
  }
  return add_apart(mask * value, (1.0f - mask) * fill);
}

// Colour ---------------------------------------------------------------------------------------

RK_HD float gray_of(float r, float g, float b) {
  return add_apart(add_apart(0.2989f * r, 0.587f * g), 0.114f * b);
}
RK_HD float gray_of(float r, float g, float b, const ImageRange& range) {
  const float gray = gray_of(r, g, b);
  return range.exact ? floored(gray) : gray;
}

RK_HD float blended(float a, float b, float factor, const ImageRange& range) {
  return range.clamp_truncated(add_apart(factor * a, (1.0f - factor) * b));
}

// Contrast's mean: of the grays of an image, each as a whole number, which sum up in any order.
RK_HD float gray_unit(const ImageRange& range) {
  return range.exact ? 1.0f : range.bound == 1.0f ? 65536.0f : 256.0f;
}
RK_HD int32_t counted_gray(float gray, const ImageRange& range) {
  const float inside = gray > 0.0f ? (gray < range.bound ? gray : range.bound) : 0.0f;  // not NaN
  return static_cast<int32_t>(rounded(inside * gray_unit(range)));
}
RK_HD float gray_mean(int64_t sum, int64_t pixels, const ImageRange& range) {
  return static_cast<float>(static_cast<double>(sum) / static_cast<double>(pixels) /
                            static_cast<double>(gray_unit(range)));
}

// Turns the hue of a pixel by `turn` of a whole circle: HSV and back, in torchvision's order.
RK_HD void turn_hue(float& red, float& green, float& blue, float turn, const ImageRange& range) {
  const float r = red / range.bound, g = green / range.bound, b = blue / range.bound;
  float most = r > g ? r : g, least = r < g ? r : g;
  most = most > b ? most : b;
  least = least < b ? least : b;
  const float sum = r + g + b;
  if (sum != sum) most = sum;  // one of them is NaN, then all become so
  const bool is_gray = most == least;
  const float span = most - least, divisor = is_gray ? 1.0f : span;
  const float s = span / (is_gray ? 1.0f : most);
  const float rc = (most - r) / divisor, gc = (most - g) / divisor, bc = (most - b) / divisor;
  const float sextant = most == r ? bc - gc : most == g ? (rc + 2.0f) - bc : (gc + 4.0f) - rc;
  float h = add_apart(sextant * (1.0f / 6.0f), 1.0f);
  h = h - floored(h);
  h = h + turn;
  h = h - floored(h);
  const float h6 = h * 6.0f, sector = floored(h6), f = subtract_apart(h6, sector);
  const auto in_unit = [](float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; };
  const float sf = s * f, rest = 1.0f - s;
  const float q = in_unit(subtract_apart(1.0f, sf) * most);
  const float t = in_unit(add_apart(sf, rest) * most);
  const float p = in_unit(rest * most);
  // A sector of 6 is 0.
  const float red_ = sector == 1.0f                     ? q
                     : sector == 2.0f || sector == 3.0f ? p
                     : sector == 4.0f                   ? t
                                                        : most;
  const float green_ = sector == 1.0f || sector == 2.0f   ? most
                       : sector == 3.0f                   ? q
                       : sector == 4.0f || sector == 5.0f ? p
                                                          : t;
  const float blue_ = sector == 2.0f                     ? t
                      : sector == 3.0f || sector == 4.0f ? most
                      : sector == 5.0f                   ? q
                                                         : p;
  const auto stored = [&](float x) {
    return range.exact ? floored(x * 255.999f) : range.clamp(x * range.bound);
  };
  red = stored(red_);
  green = stored(green_);
  blue = stored(blue_);
}

RK_HD float solarized(float v, float threshold, const ImageRange& range) {
  return v >= threshold ? range.bound - v : v;
}

RK_HD float solarize_added(float v, float threshold, float addend, const ImageRange& range) {
  const float sum = v + addend;
  return v < threshold ? (sum < range.bound ? sum : range.bound) : v;
}

// Keeps so many bits of 8.
struct Posterize {
  float to_levels, from_levels, most;

  static RK_HD Posterize of(int bits, const ImageRange& range) {
    const float levels = static_cast<float>(1 << bits);
    if (range.bound == 1.0f) return {levels, 1.0f / levels, levels - 1.0f};
    return {levels / 256.0f, 256.0f / levels, levels - 1.0f};
  }
  RK_HD float operator()(float v) const {
    const float level = floored(v * to_levels);
    return (level < 0.0f ? 0.0f : level > most ? most : level) * from_levels;
  }
};

// Stretches [lo, hi] to the whole range.
struct Autocontrast {
  float lo, divisor;
  bool changes;

  static RK_HD Autocontrast of(float lo, float hi, const ImageRange& range) {
    return {lo, (hi - lo) * (1.0f / range.bound), hi != lo};
  }
  RK_HD float operator()(float v, const ImageRange& range) const {
    return changes ? range.clamp_truncated((v - lo) / divisor) : v;
  }
};

RK_HD int gray_level(float v, const ImageRange& range) {
  const float level = rounded(v * (255.0f / range.bound));
  return static_cast<int>(level > 0.0f ? (level < 255.0f ? level : 255.0f) : 0.0f);
}
RK_HD float of_gray_level(int level, const ImageRange& range) {
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
RK_HD float sharpened(float v, float sum, float factor, const ImageRange& range) {
  const float smooth = range.clamp_rounded(sum);
  return range.clamp_truncated(add_apart(v, (1.0f - factor) * (smooth - v)));
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

  RK_HD float operator()(float v, float normal, const ImageRange& range) const {
    const float noise = add_apart(mean, std * normal);
    if (range.exact) return range.clamp(v + truncated(noise));
    const float noisy = v + noise;
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

  RK_HD float operator()(float v, uint32_t half_word, const ImageRange& range) const {
    const float u = static_cast<float>(half_word) * 0x1p-16f;
    return u < share ? (u < salt ? range.bound : 0.0f) : v;
  }
};

RK_NAMESPACE_END
