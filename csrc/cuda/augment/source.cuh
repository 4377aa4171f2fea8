// What a segment reads for a pixel of its own: the image, and the way back to a place in it.
#pragma once

#include "plan.h"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kAugmentPixels = kLoadVector;  // of a thread, side by side in a row

// The values of a thread's pixels.
template <int kChannels>
using AugmentValues = float[kChannels][kAugmentPixels];

RK_HD float load(uint8_t value) { return static_cast<float>(value); }
using reg_kernels::load;

// An image in memory. Channels past `channels`, which a kernel has where an image has two, are the
// last one again.
template <typename In>
struct AugmentImage {
  const In* data;
  int64_t plane;  // from channel to channel
  int row, column;
  int height, width;

  template <typename T, int kChannels>
  __device__ __forceinline__ void read(int y, int x, int channels, T (&values)[kChannels]) const {
    const In* at = in_global_memory(data + static_cast<int64_t>(y) * row + x * column);
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      values[c] = load(*at);
      if (kChannels < 4 || c + 1 < channels) at += plane;
    }
  }
};

// Puts a pixel behind the others, of which the first one goes: after as many as there are, each is
// at its place. So a loop that is not unrolled fills registers, which have no index.
template <int kChannels>
__device__ __forceinline__ void push_pixel(AugmentValues<kChannels>& values,
                                           const float (&pixel)[kChannels]) {
  RK_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    RK_UNROLL
    for (int p = 0; p + 1 < kAugmentPixels; ++p) values[c][p] = values[c][p + 1];
    values[c][kAugmentPixels - 1] = pixel[c];
  }
}

struct AugmentPlace {
  int y, x;
};

// Leads a place of what a move writes back to that which it reads; false where that is outside.
__device__ __forceinline__ bool lead_back(const float* a, bool is_box, AugmentPlace& place) {
  const int height = static_cast<int>(a[kMoveSource]), width = static_cast<int>(a[kMoveSource + 1]);
  if (is_box) {
    const auto box = BoxArguments::of(a);
    const auto rows = BoxAxis::of(box.height, box.out_height, box.flip_rows, box.filter, false);
    const auto columns = BoxAxis::of(box.width, box.out_width, box.flip_columns, box.filter, false);
    const int y = padded_index(box.top + rows.one(place.y), height, box.pad);
    const int x = padded_index(box.left + columns.one(place.x), width, box.pad);
    const bool inside = y >= 0 && x >= 0;
    place = inside ? AugmentPlace{y, x} : AugmentPlace{0, 0};
    return inside;
  }
  const auto warp = WarpArguments::of(a);
  const auto at = warp_point(warp.m, warp.affine(), static_cast<float>(place.x),
                             static_cast<float>(place.y));
  const float y = rounded(at.y), x = rounded(at.x);
  const bool inside = y >= 0.0f && y < static_cast<float>(height) && x >= 0.0f &&
                      x < static_cast<float>(width);
  place = inside ? AugmentPlace{static_cast<int>(y), static_cast<int>(x)} : AugmentPlace{0, 0};
  return inside;
}

// WARP between pixels, of one pixel.
template <typename In, int kChannels>
__device__ __forceinline__ void warp_pixel(const AugmentImage<In>& image, const float* a,
                                           const ImageRange& range, int channels,
                                           AugmentPlace place, float (&result)[kChannels]) {
  const auto warp = WarpArguments::of(a);
  const auto at = warp_point(warp.m, warp.affine(), static_cast<float>(place.x),
                             static_cast<float>(place.y));
  const float left = floored(at.x), top = floored(at.y);
  const float wx = at.x - left, wy = at.y - top;
  // What is further out than any neighbour of the image, or NaN, has its neighbours outside.
  const auto index = [](float where, int side) {
    return where >= -4.0f && where <= static_cast<float>(side) + 4.0f ? static_cast<int>(where)
                                                                      : -4;
  };
  const int x0 = index(left, image.width), y0 = index(top, image.height);
  const auto neighbour = [&](int y, int x, float outside, float (&p)[kChannels]) {
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(image.height) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(image.width);
    if (inside) {
      image.read(y, x, channels, p);
    } else {
      RK_UNROLL
      for (int c = 0; c < kChannels; ++c) p[c] = range.exact ? outside : warp.fill(c);
    }
    return inside;
  };
  if (warp.filter == AugmentFilter::bilinear) {
    float p[4][kChannels], in[4];
    RK_UNROLL
    for (int k = 0; k < 4; ++k) {
      in[k] = neighbour(y0 + k / 2, x0 + k % 2, 0.0f, p[k]) ? 1.0f : 0.0f;
    }
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const float four[4] = {p[0][c], p[1][c], p[2][c], p[3][c]};
      result[c] = range.exact ? range.clamp_rounded(
                                    between_four_masked(four, in, wx, wy, warp.fill(c)))
                              : between_four(four, wx, wy);
    }
    return;
  }
  const auto across = CubicWeights<float>::of(wx), down = CubicWeights<float>::of(wy);
  RK_UNROLL
  for (int i = 0; i < 4; ++i) {
    float row[kChannels];
    RK_UNROLL
    for (int j = 0; j < 4; ++j) {
      float p[kChannels];
      if (!neighbour(y0 - 1 + i, x0 - 1 + j, 0.0f, p) && range.exact) {
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) p[c] = warp.fill(c);
      }
      RK_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        row[c] = j == 0 ? across.w[0] * p[c] : plus(row[c], across.w[j] * p[c]);
      }
    }
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      result[c] = i == 0 ? down.w[0] * row[c] : plus(result[c], down.w[i] * row[c]);
    }
  }
  if (range.bound != 1.0f) {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) result[c] = range.clamp_rounded(result[c]);
  }
}

// SHARPNESS of one pixel.
template <typename In, int kChannels>
__device__ __forceinline__ void sharpness_pixel(const AugmentImage<In>& image, const float* a,
                                                const ImageRange& range, int channels,
                                                AugmentPlace place, float (&result)[kChannels]) {
  const auto [y, x] = place;
  image.read(y, x, channels, result);
  if (y == 0 || x == 0 || y == image.height - 1 || x == image.width - 1) return;
  float sum[kChannels];
  RK_UNROLL
  for (int k = 0; k < 9; ++k) {
    float p[kChannels];
    image.read(y - 1 + k / 3, x - 1 + k % 3, channels, p);
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const float part = (k == 4 ? kSmoothCentre : kSmoothSide) * p[c];
      sum[c] = k == 0 ? part : plus(sum[c], part);
    }
  }
  RK_UNROLL
  for (int c = 0; c < kChannels; ++c) result[c] = sharpened(result[c], sum[c], a[1], range);
}

}  // namespace cuda
RK_NAMESPACE_END
