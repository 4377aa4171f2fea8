// The instructions that make a pixel of the pixel in its place, for a row at a time, and what is
// counted of an image for those of them that need to know all of it.
#pragma once

#include "augment_rows.h"
#include "normals.h"
#include "random.h"

RK_NAMESPACE_BEGIN
namespace {

// Of an image, row by row: what CONTRAST, AUTOCONTRAST or EQUALIZE asks.
class ImageStatistics {
 public:
  void start(AugmentOp op, int channels, const ImageRange& range) {
    op_ = op;
    channels_ = channels;
    range_ = range;
    sum_ = 0;
    pixels_ = 0;
    for (int c = 0; c < channels; ++c) {
      least_[c] = all(__builtin_inff());
      most_[c] = all(-__builtin_inff());
    }
    if (op == AugmentOp::equalize) {
      counts_ = counts_room_.at_least(kMostChannels * kCopies * kGrays);
      memset(counts_, 0, channels * kCopies * kGrays * sizeof(int32_t));
    }
  }

  // A row, which has room for whole vectors.
  RK_STAGE void add(const ConstRowSet& rows, int64_t width) {
    pixels_ += width;
    if (op_ == AugmentOp::contrast) {
      add_grays(rows, width);
    } else if (op_ == AugmentOp::autocontrast) {
      for (int c = 0; c < channels_; ++c) add_ends(rows.channel[c], width, least_[c], most_[c]);
    } else {
      for (int c = 0; c < channels_; ++c) {
        count_levels(rows.channel[c], width, counts_ + c * kCopies * kGrays);
      }
    }
  }

  // What they come to.
  float mean() const { return gray_mean(sum_, pixels_, range_); }
  Autocontrast ends(int c) const {
    float least = __builtin_inff(), most = -least;
    for (int i = 0; i < kVector; ++i) {
      least = least_[c][i] < least ? least_[c][i] : least;
      most = most_[c][i] > most ? most_[c][i] : most;
    }
    return Autocontrast::of(least, most, range_);
  }
  // The value of each level; false where none changes.
  bool equalized(int c, float* table) const {
    int32_t levels[kGrays];
    const int32_t* const counts = counts_ + c * kCopies * kGrays;
    for (int k = 0; k < kGrays; ++k) {
      levels[k] = 0;
      for (int i = 0; i < kCopies; ++i) levels[k] += counts[i * kGrays + k];
    }
    if (!equalize_table(levels, levels)) return false;
    for (int k = 0; k < kGrays; ++k) table[k] = of_gray_level(levels[k], range_);
    return true;
  }

 private:
  static constexpr int kCopies = 4;  // of a histogram: the same level may come again at once

  // f(i, mask) for each vector of a row; of the last one the lanes of `mask` count.
  template <typename F>
  static RK_HD void for_vectors(int64_t width, const F& f) {
    int64_t i = 0;
    for (; i + kVector <= width; i += kVector) f(i, ~Integers{});
    if (i < width) f(i, lane_numbers() < static_cast<int32_t>(width - i));
  }

  void add_grays(const ConstRowSet& rows, int64_t width) {
    Integers sums{};  // of at most 65536 / kVector grays of at most 65536
    for_vectors(width, [&](int64_t i, Integers mask) RK_INLINE {
      Vector gray = vector_at(rows.channel[0] + i);
      if (channels_ == 3) {
        gray =
            gray_of(gray, vector_at(rows.channel[1] + i), vector_at(rows.channel[2] + i), range_);
      }
      sums += as_integers(counted_gray(gray, range_)) & mask;
    });
    for (int i = 0; i < kVector; ++i) sum_ += sums[i];
  }

  static void add_ends(const float* row, int64_t width, Vector& least, Vector& most) {
    for_vectors(width, [&](int64_t i, Integers mask) RK_INLINE {
      const Vector v = vector_at(row + i);
      least = (v < least) & mask ? v : least;
      most = (v > most) & mask ? v : most;
    });
  }

  void count_levels(const float* row, int64_t width, int32_t* counts) const {
    constexpr int64_t kChunk = 256;
    const ImageRange range = range_;
    int32_t levels[kChunk];
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t count = min(kChunk, width - first);
      for (int64_t i = 0; i < count; i += kVector) {
        const Integers level = as_integers(gray_level(vector_at(row + first + i), range));
        memcpy(levels + i, &level, sizeof(level));
      }
      int64_t i = 0;
      for (; i + kCopies <= count; i += kCopies) {
        for (int j = 0; j < kCopies; ++j) ++counts[j * kGrays + levels[i + j]];
      }
      for (; i < count; ++i) ++counts[levels[i]];
    }
  }

  AugmentOp op_ = AugmentOp::none;
  int channels_ = 0;
  ImageRange range_{};
  int64_t sum_ = 0, pixels_ = 0;
  Vector least_[kMostChannels], most_[kMostChannels];
  Room<int32_t> counts_room_;
  int32_t* counts_ = nullptr;
};

// A run of such instructions, of an image of height x width.
class PixelInstructions {
 public:
  // The rows and another set of as much room; `rows` are the result afterwards.
  RowSet rows{}, spare{};

  void set(int channels, int height, int width, const ImageRange& range) {
    channels_ = channels;
    height_ = height;
    width_ = width;
    range_ = range;
    rows = rows_room_.at_least(width);
    spare = spare_room_.at_least(width);
  }

  // Before an instruction that goes by them.
  void take(AugmentOp op, int channels, const ImageStatistics& statistics) {
    if (op == AugmentOp::contrast) mean_ = statistics.mean();
    for (int c = 0; c < channels; ++c) {
      if (op == AugmentOp::autocontrast) ends_[c] = statistics.ends(c);
      if (op == AugmentOp::equalize) changes_[c] = statistics.equalized(c, tables_[c]);
    }
  }

  // One instruction on row y.
  RK_STAGE void run(const float* a, int y) {
    // By value, so that loops need not look whether what they write is one of these.
    const ImageRange range = range_;
    const float first = a[1], second = a[2];
    switch (static_cast<AugmentOp>(static_cast<int>(a[0]))) {
      case AugmentOp::brightness:
        return each([=](Vector v) RK_INLINE { return range.clamp_truncated(v * first); });
      case AugmentOp::contrast:
        return each([=, mean = all(mean_)](Vector v)
                        RK_INLINE { return blended(v, mean, first, second, range); });
      case AugmentOp::saturation:
        return each_pixel([=](Vector& r, Vector& g, Vector& b) RK_INLINE {
          const Vector gray = gray_of(r, g, b, range);
          r = blended(r, gray, first, second, range);
          g = blended(g, gray, first, second, range);
          b = blended(b, gray, first, second, range);
        });
      case AugmentOp::hue:
        return each_pixel([=](Vector& r, Vector& g, Vector& b)
                              RK_INLINE { turn_hue(r, g, b, first, range); });
      case AugmentOp::grayscale:
        return each_pixel([=](Vector& r, Vector& g, Vector& b)
                              RK_INLINE { r = g = b = gray_of(r, g, b, range); });
      case AugmentOp::invert: return each([=](Vector v) RK_INLINE { return range.bound - v; });
      case AugmentOp::solarize:
        return each([=](Vector v) RK_INLINE { return solarized(v, first, range); });
      case AugmentOp::solarize_add:
        return each([=](Vector v) RK_INLINE { return solarize_added(v, first, second, range); });
      case AugmentOp::posterize: {
        const Posterize posterize = Posterize::of(static_cast<int>(a[1]), range);
        return each([=](Vector v) RK_INLINE { return posterize(v); });
      }
      case AugmentOp::autocontrast:
        return each_channel([=, this](int c) {
          return [range, ends = ends_[c]](Vector v) RK_INLINE { return ends(v, range); };
        });
      case AugmentOp::equalize: return equalize();
      case AugmentOp::noise: return noise(a, y);
      case AugmentOp::permute: return permute(a);
      case AugmentOp::erase: return erase(EraseArguments::of(a), y);
      case AugmentOp::normalize:
        return each_channel([=](int c) {
          return [scale = a[1 + c], shift = a[5 + c]](Vector v)
                     RK_INLINE { return v * scale + shift; };
        });
      case AugmentOp::salt_and_pepper: return salt_and_pepper(a, y);
      case AugmentOp::mix:
        return each([=](Vector v) RK_INLINE { return range.clamp_truncated(v); });
      default: return;
    }
  }

 private:
  // Each value, by a function of its own for each channel or by the same one.
  template <typename FunctionOf>
  RK_HD void each_channel(const FunctionOf& function_of) {
    const int64_t width = width_;
    for (int c = 0; c < channels_; ++c) {
      float* const row = rows.channel[c];
      const auto f = function_of(c);
      for (int64_t i = 0; i < width; i += kVector) put(row + i, f(vector_at(row + i)));
    }
  }
  template <typename F>
  RK_HD void each(const F& f) {
    each_channel([&](int) { return f; });
  }

  // Each pixel of three channels.
  template <typename F>
  RK_HD void each_pixel(const F& f) {
    float* const channel[3] = {rows.channel[0], rows.channel[1], rows.channel[2]};
    const int64_t width = width_;
    for (int64_t i = 0; i < width; i += kVector) {
      Vector r = vector_at(channel[0] + i), g = vector_at(channel[1] + i),
             b = vector_at(channel[2] + i);
      f(r, g, b);
      put(channel[0] + i, r);
      put(channel[1] + i, g);
      put(channel[2] + i, b);
    }
  }

  void equalize() {
    for (int c = 0; c < channels_; ++c) {
      if (!changes_[c]) continue;
      float* const row = rows.channel[c];
      for (int64_t i = 0; i < width_; i += kVector) {
        put(row + i, gathered(tables_[c], as_integers(gray_level(vector_at(row + i), range_))));
      }
    }
  }

  void permute(const float* a) {
    for (int c = 0; c < 3; ++c) {
      memcpy(spare.channel[c], rows.channel[static_cast<int>(a[1 + c])], width_ * sizeof(float));
    }
    const RowSet other = rows;
    rows = spare;
    spare = other;
  }

  // Calls f(drawn, x, count) for the draws of places [x, x + count) of row y of channel c, tile by
  // tile.
  template <typename Draws, typename F>
  RK_HD void for_draws(Draws& draws, const float* key, int c, int y, int64_t begin, int64_t end,
                       const F& f) {
    const RngStream stream = augment_stream(key);
    const int64_t first = (static_cast<int64_t>(c) * height_ + y) * width_;
    for (int64_t x = begin; x < end; x += kDrawTile) {
      const int64_t count = min(kDrawTile, end - x);
      f(draws.fill(stream, first + x, count), x, count);
    }
  }

  // The normal numbers of places [begin, end) of a channel's row, into `spare`.
  const float* normals(const float* key, int c, int y, int64_t begin, int64_t end) {
    float* const to = spare.channel[0];
    for_draws(words_, key, c, y, begin, end,
              [&](const uint32_t* drawn, int64_t x, int64_t count) RK_INLINE {
                make_normals(words_.drawn, drawn + count - words_.drawn);
                memcpy(to + x, drawn, count * sizeof(float));
              });
    return to;
  }

  void noise(const float* a, int y) {
    const NoiseArguments noise = NoiseArguments::of(a);
    for (int c = 0; c < channels_; ++c) {
      const float* const z = normals(NoiseArguments::key(a), c, y, 0, width_);
      float* const row = rows.channel[c];
      for (int64_t i = 0; i < width_; i += kVector) {
        put(row + i, noise(vector_at(row + i), vector_at(z + i), range_));
      }
    }
  }

  void erase(const EraseArguments& erase, int y) {
    if (y < erase.top || y >= erase.top + erase.height) return;
    const int64_t begin = erase.left, end = begin + erase.width;
    for (int c = 0; c < channels_; ++c) {
      float* const row = rows.channel[c];
      if (erase.normal) {
        const float* const z = normals(erase.key, c, y, begin, end);
        memcpy(row + begin, z + begin, (end - begin) * sizeof(float));
      } else {
        for (int64_t i = begin; i < end; ++i) row[i] = erase.values[c];
      }
    }
  }

  // Whole vectors of a tile: what they write behind it is overwritten, or lies behind the row.
  void salt_and_pepper(const float* a, int y) {
    const SaltAndPepperArguments impulses = SaltAndPepperArguments::of(a);
    const ImageRange range = range_;
    for (int c = 0; c < channels_; ++c) {
      float* const row = rows.channel[c];
      for_draws(half_words_, SaltAndPepperArguments::key(a), c, y, 0, width_,
                [&](const uint16_t* drawn, int64_t x, int64_t count) RK_INLINE {
                  float half_words[kVector];
                  for (int64_t i = 0; i < count; i += kVector) {
                    for (int j = 0; j < kVector; ++j) half_words[j] = drawn[i + j];
                    float* const at = row + x + i;
                    put(at, impulses(vector_at(at), vector_at(half_words), range));
                  }
                });
    }
  }

  int channels_ = 0, height_ = 0, width_ = 0;
  ImageRange range_{};
  RowRoom rows_room_, spare_room_;
  float mean_ = 0.0f;
  Autocontrast ends_[kMostChannels] = {};
  float tables_[kMostChannels][kGrays];
  bool changes_[kMostChannels] = {};
  DrawsOf<uint32_t> words_;
  DrawsOf<uint16_t> half_words_;
};

}  // namespace
RK_NAMESPACE_END
