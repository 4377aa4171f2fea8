// What a segment reads for a pixel of its own: the image, and the way back to a place in it.
#pragma once

#include "plan.h"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kAugmentPixels = kLoadVector;  // of a thread, side by side in a row
constexpr int kAugmentThreads = kAugmentTile * kAugmentTile / kAugmentPixels;

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

// A block's pixels in shared memory, each thread's own: where what makes one of them takes so many
// registers that the others are better elsewhere.
template <int kChannels>
struct StagedPixels {
  float values[kChannels][kAugmentPixels][kAugmentThreads];

  __device__ void put(int p, const float (&pixel)[kChannels]) {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) values[c][p][threadIdx.x] = pixel[c];
  }
  __device__ void get(int p, float (&pixel)[kChannels]) const {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) pixel[c] = values[c][p][threadIdx.x];
  }
  __device__ void get_all(AugmentValues<kChannels>& all) const {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) all[c][p] = values[c][p][threadIdx.x];
    }
  }
};

struct AugmentPlace {
  int y, x;
};

// Leads a place of what a move writes back to that which it reads; false where that is outside.
__device__ __forceinline__ bool lead_back(const float* a, bool is_box, bool exact,
                                          AugmentPlace& place) {
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
  const auto at = WarpPlaces::of(warp, height, width, exact)(static_cast<float>(place.x),
                                                             static_cast<float>(place.y));
  const float y = rounded(at.y), x = rounded(at.x);
  const bool inside =
      y >= 0.0f && y < static_cast<float>(height) && x >= 0.0f && x < static_cast<float>(width);
  place = inside ? AugmentPlace{static_cast<int>(y), static_cast<int>(x)} : AugmentPlace{0, 0};
  return inside;
}

// WARP between pixels, of one pixel.
template <typename In, int kChannels>
__device__ __forceinline__ void warp_pixel(const AugmentImage<In>& image, const float* a,
                                           const ImageRange& range, int channels,
                                           AugmentPlace place, float (&result)[kChannels]) {
  const auto warp = WarpArguments::of(a);
  const auto at = WarpPlaces::of(warp, image.height, image.width, range.exact)(
      static_cast<float>(place.x), static_cast<float>(place.y));
  RK_UNROLL
  for (int c = 0; c < kChannels; ++c) result[c] = warp.fill(c);
  if (fabsf(at.x) < kNear && fabsf(at.y) < kNear) {
    const float left = floored(at.x), top = floored(at.y);
    const float wx = at.x - left, wy = at.y - top;
    const int x0 = static_cast<int>(left), y0 = static_cast<int>(top);
    const bool faded = warp.filter == WarpFilter::faded;
    const auto neighbour = [&](int y, int x, float (&p)[kChannels]) {
      const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(image.height) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(image.width);
      if (inside) {
        image.read(y, x, channels, p);
      } else {
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) p[c] = faded ? 0.0f : warp.fill(c);
      }
      return inside;
    };
    if (warp.filter != WarpFilter::bicubic) {
      float p[4][kChannels], in[4];
      RK_UNROLL
      for (int k = 0; k < 4; ++k) in[k] = neighbour(y0 + k / 2, x0 + k % 2, p[k]) ? 1.0f : 0.0f;
      RK_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        const float four[4] = {p[0][c], p[1][c], p[2][c], p[3][c]};
        result[c] =
            faded ? between_four_faded(four, in, wx, wy, warp.fill(c)) : between_four(four, wx, wy);
      }
    } else {
      const auto across = CubicWeights<float>::of(wx);
      auto down = CubicWeights<float>::of(wy);
      RK_NO_UNROLL
      for (int i = 0; i < 4; ++i) {
        float row[kChannels];
        RK_UNROLL
        for (int j = 0; j < 4; ++j) {
          float p[kChannels];
          neighbour(y0 - 1 + i, x0 - 1 + j, p);
          RK_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            row[c] = j == 0 ? p[c] * across.w[0] : plus(row[c], p[c] * across.w[j]);
          }
        }
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          const float part = row[c] * down.w[0];
          result[c] = i == 0 ? part : plus(result[c], part);
        }
        down = {{down.w[1], down.w[2], down.w[3], 0.0f}};  // registers have no index
      }
    }
  }
  RK_UNROLL
  for (int c = 0; c < kChannels; ++c) result[c] = range.resampled(result[c]);
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
  for (int c = 0; c < kChannels; ++c) result[c] = sharpened(result[c], sum[c], a[2], range);
}

}  // namespace cuda
RK_NAMESPACE_END
