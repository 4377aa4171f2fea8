// BOX with several taps, and BLUR: separable sums by way of shared memory.
//
// A block makes the taps of its tile's rows and columns once. Then it sums up vertically, for each
// row of the tile and each column of the image that one of the tile's columns needs, into shared
// memory, and each thread sums up its pixels horizontally from there. What needs more columns than
// there is room for takes several rounds; the sums' order is the same.
#pragma once

#include "source.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kPlaces = 2 * kAugmentTile;  // of a tile: its rows, then its columns

// Columns that shared memory has room for: with taps and staged pixels less than 48 KiB. A row
// of them is one float longer: the rows of a warp begin in different banks.
template <int kChannels>
constexpr int kBoxColumns = kChannels == 1   ? 128
                            : kChannels == 3 ? 48
                                             : 32;
template <int kChannels>
constexpr int kBoxRow = kBoxColumns<kChannels> * kChannels + 1;

// One axis of BOX or BLUR. Taps are places of the image, before `pad` says what is there.
struct TapAxis {
  BoxAxis box;
  const float* blur;  // BLUR's weights by distance, or null
  int radius;
  int start, low, high;  // of the region: added to a tap's place, and what taps are held to
  int side;              // the image's
  AugmentPad pad;

  static __device__ TapAxis of_box(const BoxAxis& axis, int start, int side, AugmentPad pad) {
    return {axis, nullptr, 0, start, start, start + axis.length - 1, side, pad};
  }
  static __device__ TapAxis of_blur(const float* weights, int radius, bool smooths, int side) {
    const auto copy = BoxAxis::of(side, side, false, AugmentFilter::nearest, false);
    if (!smooths) return of_box(copy, 0, side, AugmentPad::none);
    return {copy, weights, radius, 0, -radius, side - 1 + radius, side, AugmentPad::reflect};
  }
  static __device__ TapAxis of(const float* a, bool is_blur, bool rows, int side) {
    if (is_blur) {
      const auto blur = BlurArguments::of(a);
      return of_blur(blur.weights, blur.radius, rows ? blur.rows : blur.columns, side);
    }
    const auto box = BoxArguments::of(a);
    const auto axis =
        BoxAxis::of(rows ? box.height : box.width, rows ? box.out_height : box.out_width,
                    rows ? box.flip_rows : box.flip_columns, box.filter, box.antialias);
    return of_box(axis, rows ? box.top : box.left, side, box.pad);
  }

  __device__ int held(int tap) const { return tap < low ? low : tap > high ? high : tap; }
};

// The taps of a tile's rows and columns, in shared memory.
struct TapTable {
  TapAxis rows, columns;
  int first[kPlaces], count[kPlaces];
  int taps;          // for how many of a place there is room
  float weights[1];  // [kPlaces, taps]; where there are more, their sum and the centre

  __device__ bool holds(int count) const { return count <= taps; }

  // Of place i of an axis, by one thread.
  __device__ void fill(int slot, int room, const TapAxis& axis, int i) {
    float* w = weights + slot * room;
    if (axis.blur) {
      first[slot] = i - axis.radius;
      count[slot] = 2 * axis.radius + 1;
      RK_NO_UNROLL
      for (int j = -axis.radius; j <= axis.radius; ++j) *w++ = axis.blur[j < 0 ? -j : j];
      return;
    }
    const BoxAxis& box = axis.box;
    first[slot] = axis.start + box.first_tap(i);
    if (box.takes_one()) {
      count[slot] = 1;
      w[0] = 1.0f;
    } else if (box.antialias) {
      const auto span = box.span(i);
      count[slot] = span.count;
      const bool tabled = span.count <= room;
      float total = 0.0f;
      RK_NO_UNROLL
      for (int j = 0; j < span.count; ++j) {
        const float weight = box.unscaled_weight(span, j);
        if (tabled) w[j] = weight;
        total = plus(total, weight);
      }
      RK_NO_UNROLL
      for (int j = 0; tabled && j < span.count; ++j) w[j] = w[j] / total;
      if (!tabled) w[0] = total, w[1] = span.centre;
    } else if (box.filter == AugmentFilter::bilinear) {
      const auto at = box.between(i);
      count[slot] = 2;
      w[0] = 1.0f - at.fraction;
      w[1] = at.fraction;
    } else {
      const auto cubic = CubicWeights<float>::of(box.between(i).fraction);
      count[slot] = 4;
      RK_UNROLL
      for (int j = 0; j < 4; ++j) w[j] = cubic.w[j];
    }
  }

  __device__ __forceinline__ float weight(int slot, int j, const TapAxis& axis) const {
    const float* const w = weights + slot * taps;
    if (holds(count[slot])) return w[j];
    const BoxAxis::Span span{first[slot] - axis.start, count[slot], w[1]};
    return axis.box.unscaled_weight(span, j) / w[0];
  }
};

// Makes the table of a tile of which the first pixel is (top, left); by all threads of a block,
// which may use it after their next barrier.
__device__ __forceinline__ void fill_table(TapTable& table, int taps, const float* a, bool is_blur,
                                           int image_height, int image_width, int out_height,
                                           int out_width, int top, int left) {
  const int thread = threadIdx.x;
  if (thread >= kPlaces) return;
  const bool of_row = thread < kAugmentTile;
  const TapAxis axis = TapAxis::of(a, is_blur, of_row, of_row ? image_height : image_width);
  if (thread % kAugmentTile == 0) {
    of_row ? table.rows = axis : table.columns = axis;
    table.taps = taps;
  }
  // What is beyond the image's end, in its last tiles, has the last place's taps.
  table.fill(thread, taps, axis,
             of_row ? static_cast<int>(min(top + thread, out_height - 1))
                    : static_cast<int>(min(left + thread - kAugmentTile, out_width - 1)));
}

// Adds to sums that which the taps of a place bring, where these are rows of an image that follow
// one another. `at` is its pixel in the first one.
template <bool kLast, typename In, int kChannels>
__device__ __forceinline__ void add_rows(const In* at, int row, int64_t plane, int channels,
                                         const float* weights, int count, float (&sum)[kChannels]) {
  RK_UNROLL_BY(2)
  for (int j = 0; j < count; ++j) {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const int64_t channel = kChannels == 4 && c >= channels ? channels - 1 : c;
      sum[c] = plus(sum[c], load(at[kLast ? channel : channel * plane]) * weights[j]);
    }
    at += row;
  }
}

// The sums of all columns of the image from `begin` on, `width` of them, down the tile's rows.
template <typename In, int kChannels>
__device__ __forceinline__ void sum_down(const AugmentImage<In>& image, const float* fill,
                                         int channels, const TapTable& table, int begin, int width,
                                         float* lines) {
  const TapAxis &rows = table.rows, &columns = table.columns;
  const int thread = threadIdx.x;
  const int least = static_cast<int>(max(rows.low, 0));
  const int most = static_cast<int>(min(rows.high, rows.side - 1));
  const int rows_on = kAugmentThreads / width, columns_on = kAugmentThreads % width;
  int r = thread / width, k = thread % width;
  RK_NO_UNROLL
  while (r < kAugmentTile) {
    const int x = padded_index(begin + k, image.width, columns.pad);
    const int first = table.first[r], count = table.count[r];
    float sum[kChannels];
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) sum[c] = -0.0f;  // which leaves the first term as it is
    if (x >= 0 && first >= least && first + count - 1 <= most && table.holds(count)) {
      const In* const at =
          in_global_memory(image.data) + static_cast<int64_t>(first) * image.row + x * image.column;
      const float* const weights = table.weights + r * table.taps;
      if (image.plane == 1) {
        add_rows<true>(at, image.row, 1, channels, weights, count, sum);
      } else {
        add_rows<false>(at, image.row, image.plane, channels, weights, count, sum);
      }
    } else if (x >= 0) {
      RK_NO_UNROLL
      for (int j = 0; j < count; ++j) {
        const int y = padded_index(rows.held(first + j), image.height, rows.pad);
        float p[kChannels];
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) p[c] = fill[c];
        if (y >= 0) image.read(y, x, channels, p);
        const float weight = table.weight(r, j, rows);
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) sum[c] = plus(sum[c], weight * p[c]);
      }
    } else {
      RK_UNROLL
      for (int c = 0; c < kChannels; ++c) sum[c] = fill[c];
    }
    float* const line = lines + r * kBoxRow<kChannels> + k * kChannels;
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) line[c] = sum[c];
    r += rows_on;
    k += columns_on;
    if (k >= width) {
      k -= width;
      ++r;
    }
  }
}

// The pixels of a thread, in row `row` of the tile and from column `column` on.
template <typename In, int kChannels>
__device__ __forceinline__ void box_pixels(const AugmentImage<In>& image, const float* a,
                                           const ImageRange& range, int channels, int row,
                                           int column, const TapTable& table, float* lines,
                                           StagedPixels<kChannels>& staged,
                                           AugmentValues<kChannels>& values) {
  const TapAxis& columns = table.columns;
  const float* const fill = a + 10;  // BOX's; BLUR needs none
  // Taps go up or down with the columns: the ends of all are those of the tile's ends.
  const int* const firsts = table.first + kAugmentTile;
  const int* const counts = table.count + kAugmentTile;
  constexpr int kLast = kAugmentTile - 1;
  const int least = columns.held(static_cast<int>(min(firsts[0], firsts[kLast])));
  const int most = columns.held(
      static_cast<int>(max(firsts[0] + counts[0] - 1, firsts[kLast] + counts[kLast] - 1)));
  const float* const line = lines + row * kBoxRow<kChannels>;
  // All that there is in one round, and every weight in the table.
  const bool plain =
      most - least < kBoxColumns<kChannels> && table.holds(counts[0]) && table.holds(counts[kLast]);
  RK_NO_UNROLL
  for (int begin = least; begin <= most; begin += kBoxColumns<kChannels>) {
    const int width = static_cast<int>(min(most - begin + 1, kBoxColumns<kChannels>));
    if (begin > least) __syncthreads();  // the last round's lines are still read
    sum_down<In, kChannels>(image, fill, channels, table, begin, width, lines);
    __syncthreads();
    if (plain) {
      const int low = columns.low - begin, high = columns.high - begin;
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) {
        const int first = firsts[column + p] - begin, count = counts[column + p];
        const float* const weights = table.weights + (kAugmentTile + column + p) * table.taps;
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) values[c][p] = -0.0f;  // see sum_down
        RK_NO_UNROLL
        for (int j = 0; j < count; ++j) {
          const int k = first + j, held = k < low ? low : k > high ? high : k;
          const float* const at = line + held * kChannels;
          RK_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            values[c][p] = plus(values[c][p], weights[j] * at[c]);
          }
        }
      }
      break;
    }
    RK_NO_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) {
      const int first = firsts[column + p], count = counts[column + p];
      float sum[kChannels];
      RK_UNROLL
      for (int c = 0; c < kChannels; ++c) sum[c] = -0.0f;
      if (begin > least) staged.get(p, sum);
      RK_NO_UNROLL
      for (int j = 0; j < count; ++j) {
        const unsigned k = static_cast<unsigned>(columns.held(first + j) - begin);
        if (k >= static_cast<unsigned>(width)) continue;
        const float weight = table.weight(kAugmentTile + column + p, j, columns);
        RK_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          sum[c] = plus(sum[c], weight * line[k * kChannels + c]);
        }
      }
      staged.put(p, sum);
    }
  }
  if (!plain) staged.get_all(values);
  RK_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    RK_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) values[c][p] = range.resampled(values[c][p]);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
