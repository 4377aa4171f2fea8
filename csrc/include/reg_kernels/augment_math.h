// The instructions of `augment`: what their arguments say and the arithmetic of one pixel of each,
// for the CPU and the CUDA kernels.
#pragma once

#include "augment_resample.h"
#include "augment_values.h"
#include "normal.h"

RK_NAMESPACE_BEGIN

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
  const bool later = element & 2;
  const auto normals = normal_pair<OneLane>(words.w[later ? 2 : 0], words.w[later ? 1 : 3]);
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
