// WARP: each place of a row of the result finds its own in the image, a vector of places at a time.
// Where all of a vector's neighbours are inside they are read untested.
#pragma once

#include "augment_rows.h"

RK_NAMESPACE_BEGIN
namespace {

// Places (y, x) of an image, all of them inside, and their values in a channel. A pair of places
// lies side by side, so many rows and columns from an origin that several pairs are counted from;
// `pair_height` rows are such that pairs may be read in them.
class PlaneReader {
 public:
  PlaneReader(const Planes& planes, int channels)
      : height(planes.height),
        width(planes.width),
        pair_height(planes.height),
        stride_(planes.stride) {
    for (int c = 0; c < channels; ++c) planes_[c] = planes.row(c, 0);
    far_ = stride_ * height > INT32_MAX;
    if (far_) pair_height = 0;
  }

  const int height, width;
  int pair_height;

  struct Places {
    Integers y, x;
  };
  RK_HD Places at(Integers y, Integers x) const { return {y, x}; }
  RK_HD Vector value(const Places& at, int c) const {
    const float* const plane = planes_[c];
    if (far_) [[unlikely]] {
      Vector v;
      for (int i = 0; i < kVector; ++i) v[i] = plane[at.y[i] * stride_ + at.x[i]];
      return v;
    }
    return gathered(plane, at.y * static_cast<int32_t>(stride_) + at.x);
  }

  RK_HD Integers origin(Integers y, Integers x) const {
    return y * static_cast<int32_t>(stride_) + x;
  }
  struct Pair {
    Integers origin;
    int64_t shift;
  };
  RK_HD Pair pair_at(Integers origin, int down, int right) const {
    return {origin, down * stride_ + right};
  }
  RK_HD void values(const Pair& at, int c, Vector& left, Vector& right) const {
    const LanePairs both = gathered_pairs(planes_[c] + at.shift, at.origin, sizeof(float));
    left = reinterpret_cast<Vector>(both.first);
    right = reinterpret_cast<Vector>(both.second);
  }

 private:
  const float* planes_[kMostChannels] = {};
  int64_t stride_;
  bool far_;
};

// The same of bytes, read as words: of channels that lie side by side all at once.
class ByteReader {
 public:
  // Whether it can read them.
  static bool takes(const PixelImage& image) {
    const int64_t elements = int64_t{image.channels} * image.height * image.width;
    return image.type == PixelType::bytes && (image.interleaved() ? image.channels >= 3 : true) &&
           image.elements >= 4 && elements < INT32_MAX - 4;
  }

  explicit ByteReader(const PixelImage& image)
      : height(image.height),
        width(image.width),
        pair_height(image.height),
        data_(static_cast<const uint8_t*>(image.data)),
        step_(image.interleaved() ? image.channels : 1),
        plane_(image.interleaved() ? 0 : image.height * image.width),
        last_(static_cast<int32_t>(min(image.elements - 4, INT32_MAX))) {
    // Two positions of 3 bytes are read as 8.
    const int64_t behind = image.elements - int64_t{image.channels} * height * width;
    if (step_ == 3 && behind < 2) --pair_height;
  }

  const int height, width;
  int pair_height;

  struct Places {
    Integers offset, words;
  };
  RK_HD Places at(Integers y, Integers x) const {
    const Integers offset = (y * width + x) * step_;
    return {offset, plane_ ? offset : words_at(offset)};
  }
  RK_HD Vector value(const Places& at, int c) const {
    const Integers words = plane_ ? words_at(at.offset + c * plane_) : at.words >> (8 * c);
    return as_floats(words & 255);
  }

  struct Pair {
    Integers offset, left, right;
  };
  RK_HD Integers origin(Integers y, Integers x) const { return (y * width + x) * step_; }
  RK_HD Pair pair_at(Integers origin, int down, int right) const {
    const int32_t shift = (down * width + right) * step_;
    if (plane_) return {origin + shift, origin, origin};
    const LanePairs both = gathered_pairs(data_ + shift, origin, 1);
    if (step_ == 4) return {origin, both.first, both.second};
    return {origin, both.first, (both.first >> 24 & 255) | both.second << 8};
  }
  RK_HD void values(const Pair& at, int c, Vector& left, Vector& right) const {
    if (plane_) {
      const Integers words = words_at(at.offset + c * plane_);
      left = as_floats(words & 255);
      right = as_floats(words >> 8 & 255);
    } else {
      left = as_floats(at.left >> (8 * c) & 255);
      right = as_floats(at.right >> (8 * c) & 255);
    }
  }

 private:
  // The word at an offset; of what lies behind all pixels only the bits are missing.
  RK_HD Integers words_at(Integers offset) const {
    const Integers at = offset > last_ ? last_ : offset;
    return gathered_words(data_, at) >> ((offset - at) * 8);
  }

  const uint8_t* data_;
  int32_t step_, plane_, last_;
};

// An image of which only the size is asked.
struct NoReader {
  int height, width;

  struct Places {};
  RK_HD Places at(Integers, Integers) const { return {}; }
  RK_HD Vector value(const Places&, int) const { return Vector{}; }
};

class Warp {
 public:
  void set(const WarpArguments& warp, int channels, int height, int width,
           const ImageRange& range) {
    warp_ = warp;
    channels_ = channels;
    range_ = range;
    places_ = WarpPlaces::of(warp_, height, width, range.exact);
    places_.m = warp_.m;
  }

  template <typename Reader>
  RK_STAGE void row(const Reader& reader, int y, const RowSet& to) const {
    switch (warp_.filter) {
      case WarpFilter::nearest: return run(reader, y, to, Nearest{});
      case WarpFilter::faded: return run(reader, y, to, BetweenFour<true>{});
      case WarpFilter::bilinear: return run(reader, y, to, BetweenFour<false>{});
      case WarpFilter::bicubic: return run(reader, y, to, Bicubic{});
    }
  }

 private:
  // The values of neighbour (y, x) of each place in every channel, and where it is inside.
  template <typename Reader>
  struct Neighbour {
    const Reader& reader;
    typename Reader::Places places;
    Integers inside;

    RK_HD Neighbour(const Reader& reader, Integers y, Integers x) : reader(reader) {
      const Integers in_y = clamped(y, 0, reader.height - 1);
      const Integers in_x = clamped(x, 0, reader.width - 1);
      places = reader.at(in_y, in_x);
      inside = (in_y == y) & (in_x == x);
    }
    RK_HD Vector value(int c, float fill) const {
      return inside ? reader.value(places, c) : all(fill);
    }
  };

  // Each filter: which whole place it starts from, how many beside that it reads, before and
  // behind, and what it makes of them.
  struct Nearest {
    static constexpr int kBefore = 0, kBehind = 0;
    static RK_HD Vector whole(Vector u) { return rounded(u); }
    template <bool kInside, typename Reader, typename Write>
    static RK_HD void run(const Warp& warp, const Reader& reader, Integers y, Integers x, Vector,
                          Vector, const Write& write) {
      if constexpr (kInside) {
        const auto at = reader.at(y, x);
        for (int c = 0; c < warp.channels_; ++c) write(c, reader.value(at, c));
      } else {
        const Neighbour<Reader> at(reader, y, x);
        for (int c = 0; c < warp.channels_; ++c) write(c, at.value(c, warp.warp_.fill(c)));
      }
    }
  };

  template <bool kFaded>
  struct BetweenFour {
    static constexpr int kBefore = 0, kBehind = 1;
    static RK_HD Vector whole(Vector u) { return floored(u); }
    template <bool kInside, typename Reader, typename Write>
    static RK_HD void run(const Warp& warp, const Reader& reader, Integers y, Integers x, Vector wy,
                          Vector wx, const Write& write) {
      const auto between = [&](int c, const Vector(&p)[4], const Vector(&in)[4]) RK_INLINE {
        if constexpr (kFaded) {
          write(c, between_four_faded(p, in, wx, wy, warp.warp_.fill(c)));
        } else {
          write(c, between_four(p, wx, wy));
        }
      };
      Vector p[4], in[4];
      if constexpr (kInside) {
        const Integers origin = reader.origin(y, x);
        const auto above = reader.pair_at(origin, 0, 0), below = reader.pair_at(origin, 1, 0);
        for (int k = 0; k < 4; ++k) in[k] = all(1.0f);
#pragma GCC unroll 4
        for (int c = 0; c < kMostChannels; ++c) {  // by which bytes are shifted: a constant each
          if (c == warp.channels_) break;
          reader.values(above, c, p[0], p[1]);
          reader.values(below, c, p[2], p[3]);
          between(c, p, in);
        }
      } else {
        const Neighbour<Reader> at[4] = {
            {reader, y, x}, {reader, y, x + 1}, {reader, y + 1, x}, {reader, y + 1, x + 1}};
        for (int k = 0; k < 4; ++k) in[k] = at[k].inside ? all(1.0f) : all(0.0f);
        for (int c = 0; c < warp.channels_; ++c) {
          for (int k = 0; k < 4; ++k) p[k] = at[k].value(c, kFaded ? 0.0f : warp.warp_.fill(c));
          between(c, p, in);
        }
      }
    }
  };

  struct Bicubic {
    static constexpr int kBefore = 1, kBehind = 2;
    static RK_HD Vector whole(Vector u) { return floored(u); }
    template <bool kInside, typename Reader, typename Write>
    static RK_HD void run(const Warp& warp, const Reader& reader, Integers y, Integers x, Vector wy,
                          Vector wx, const Write& write) {
      const auto columns = CubicWeights<Vector>::of(wx), rows = CubicWeights<Vector>::of(wy);
      Vector sums[kMostChannels];
      for (int i = 0; i < 4; ++i) {
        const auto add = [&](int c, const Vector(&p)[4]) RK_INLINE {
          Vector in_row = p[0] * columns.w[0];
          for (int j = 1; j < 4; ++j) in_row += p[j] * columns.w[j];
          const Vector term = in_row * rows.w[i];
          sums[c] = i == 0 ? term : sums[c] + term;
        };
        const Integers row = y + (i - 1);
        Vector p[4];
        if constexpr (kInside) {
          const Integers origin = reader.origin(y, x);
          const auto left = reader.pair_at(origin, i - 1, -1);
          const auto right = reader.pair_at(origin, i - 1, 1);
          for (int c = 0; c < warp.channels_; ++c) {
            reader.values(left, c, p[0], p[1]);
            reader.values(right, c, p[2], p[3]);
            add(c, p);
          }
        } else {
          const Neighbour<Reader> at[4] = {
              {reader, row, x - 1}, {reader, row, x}, {reader, row, x + 1}, {reader, row, x + 2}};
          for (int c = 0; c < warp.channels_; ++c) {
            for (int j = 0; j < 4; ++j) p[j] = at[j].value(c, warp.warp_.fill(c));
            add(c, p);
          }
        }
      }
      for (int c = 0; c < warp.channels_; ++c) write(c, sums[c]);
    }
  };

  template <typename Reader, typename Filter>
  RK_HD void run(const Reader& reader, int row, const RowSet& to, const Filter&) const {
    const Vector row_number = all(static_cast<float>(row));
    for (int64_t i = 0; i < warp_.out_width; i += kVector) {
      const Integers column = lane_numbers() + static_cast<int32_t>(i);
      auto at = places_(as_floats(column), row_number);
      const Integers near = (at.x < kNear) & (at.x > -kNear) & (at.y < kNear) & (at.y > -kNear);
      const bool all_near = in_all_lanes(near);
      if (!all_near) {
        at.x = near ? at.x : all(0.0f);
        at.y = near ? at.y : all(0.0f);
      }
      const Vector whole_x = Filter::whole(at.x), whole_y = Filter::whole(at.y);
      const Vector wx = at.x - whole_x, wy = at.y - whole_y;
      const Integers x = as_integers(whole_x), y = as_integers(whole_y);
      const Integers inside = (x >= Filter::kBefore) & (x < reader.width - Filter::kBehind) &
                              (y >= Filter::kBefore) & (y < reader.pair_height - Filter::kBehind);
      if (all_near && in_all_lanes(inside)) {
        Filter::template run<true>(*this, reader, y, x, wy, wx, [&](int c, Vector v) RK_INLINE {
          put(to.channel[c] + i, range_.resampled(v));
        });
        continue;
      }
      const auto write = [&](int c, Vector v) RK_INLINE {
        put(to.channel[c] + i, range_.resampled(near ? v : all(warp_.fill(c))));
      };
      const Integers touches = (x >= -Filter::kBehind) & (x < reader.width + Filter::kBefore) &
                               (y >= -Filter::kBehind) & (y < reader.height + Filter::kBefore);
      if (in_any_lane(touches)) {
        Filter::template run<false>(*this, reader, y, x, wy, wx, write);
      } else {
        Filter::template run<false>(*this, NoReader{reader.height, reader.width}, y, x, wy, wx,
                                    write);
      }
    }
  }

  WarpArguments warp_{};
  int channels_ = 0;
  ImageRange range_{};
  WarpPlaces places_{};
};

}  // namespace
RK_NAMESPACE_END
