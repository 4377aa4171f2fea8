// The programs of `augment`: opcodes, what a call is about, and what the values of an image are.
//
// All is float32; each product and each sum is rounded by itself (add_apart), so that every
// implementation has the same bits. Values lie in [0, bound]. reference/augment.py has the same in
// torch, _augment_program.py the same numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
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

RK_HD ImageRange range_of(const AugmentBatch& batch) {
  return {batch.from == PixelType::bytes ? 255.0f : 1.0f, batch.exact};
}

// What a byte stores, as a whole number in [0, 255]; NaN is 0.
template <typename F>
RK_HD F stored_byte(F v) {
  v = rounded(v);
  v = v > 0.0f ? v : 0.0f;
  return v < 255.0f ? v : 255.0f;
}

RK_NAMESPACE_END
