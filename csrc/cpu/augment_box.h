// BOX: a region of an image, resampled. A row of the result is first a sum of the region's rows,
// whole ones at a time, and then of that row's places. What a place beside the image or the region
// holds is written beside the row, so that all taps of a place of the result lie side by side.
#pragma once

#include "augment_rows.h"

RK_NAMESPACE_BEGIN
namespace {

// to[x] = the sum of `count` rows with their weights, in order; of as many where that is given.
template <int kCount>
RK_HD void sum_rows(const float* const* rows, const float* weights, int given, int64_t width,
                    float* to) {
  const int count = kCount ? kCount : given;
  int64_t x = 0;
  const auto run = [&]<int kVectors>() RK_INLINE {
    Vector sums[kVectors];
    for (int k = 0; k < kVectors; ++k) sums[k] = weights[0] * vector_at(rows[0] + x + k * kVector);
    for (int j = 1; j < count; ++j) {
      for (int k = 0; k < kVectors; ++k) {
        sums[k] += weights[j] * vector_at(rows[j] + x + k * kVector);
      }
    }
    for (int k = 0; k < kVectors; ++k) put(to + x + k * kVector, sums[k]);
    x += kVectors * kVector;
  };
  while (x + 4 * kVector <= width) run.template operator()<4>();
  while (x < width) run.template operator()<1>();
}

// The taps of an axis for every place of the result: `count` of them side by side from `first` on,
// with weights that lie by tap. `first` counts from the least of a vector of places, `base`.
class TapTable {
 public:
  void set(const BoxAxis& axis) {
    places_ = axis.out;
    padded_ = whole_vectors(axis.out);
    const int most = axis.most_taps();
    weights_ = weights_room_.at_least(most * padded_);
    firsts_ = firsts_room_.at_least(padded_);
    counts_ = counts_room_.at_least(padded_);
    bases_ = bases_room_.at_least(padded_ / kVector);
    if (axis.antialias && !axis.takes_one()) {
      for (int64_t x = 0; x < padded_; x += kVector) set_wide(axis, x);
    } else {
      for (int64_t x = 0; x < padded_; ++x) set_one(axis, x);
    }
    near_ = side_by_side_ = true;
    most_ = 1;
    for (int64_t x = 0; x < padded_; x += kVector) {
      int32_t least = firsts_[x], end = 0;
      for (int64_t i = x; i < x + kVector; ++i) {
        least = static_cast<int32_t>(min(least, firsts_[i]));
        end = static_cast<int32_t>(max(end, firsts_[i] + counts_[i]));
        most_ = static_cast<int>(max(most_, counts_[i]));
      }
      bases_[x / kVector] = least;
      for (int64_t i = x; i < x + kVector; ++i) {
        firsts_[i] -= least;
        side_by_side_ = side_by_side_ && firsts_[i] < kVector;
      }
      near_ = near_ && end - least <= kPicked;
    }
  }

  int most() const { return most_; }
  int first(int64_t x) const { return bases_[x / kVector] + firsts_[x]; }
  int count(int64_t x) const { return counts_[x]; }
  float weight(int64_t x, int j) const { return weights_[j * padded_ + x]; }

  // to[x] = the sum of from[k] over the taps k of x, for each channel. What is read behind the last
  // tap counts 0; `absent` says that it may be no number.
  void sum(const ConstRowSet& from, int channels, bool absent, const ImageRange& range,
           const RowSet& to) const {
    if (channels == 3) return sum<3>(from, absent, range, to);
    for (int c = 0; c < channels; ++c) {
      sum<1>({{from.channel[c]}}, absent, range, {{to.channel[c]}});
    }
  }

 private:
  void set_one(const BoxAxis& axis, int64_t x) {
    const int place = static_cast<int>(min(x, places_ - 1));
    firsts_[x] = axis.first_tap(place);
    axis.for_taps(place, [&](int j, int, float weight) {
      weights_[j * padded_ + x] = weight;
      counts_[x] = j + 1;
    });
  }

  // A vector of places with antialiasing, as BoxAxis has each.
  void set_wide(const BoxAxis& axis, int64_t x) {
    Integers place = clamped(lane_numbers() + static_cast<int32_t>(x), 0, axis.out - 1);
    if (axis.flip) place = axis.out - 1 - place;
    const Vector centre = axis.centre_of(as_floats(place));
    const float half = axis.half();
    const Integers first = clamped(as_integers((centre - half) + 0.5f), 0, axis.length - 1);
    const Integers end = clamped(as_integers((centre + half) + 0.5f), 0, axis.length);
    const Integers count = end - first;
    memcpy(firsts_ + x, &first, sizeof(first));
    memcpy(counts_ + x, &count, sizeof(count));
    const int most = axis.most_taps();
    Vector total{};
    for (int j = 0; j < most; ++j) {
      const Vector weight = axis.unscaled_weight(as_floats(first + j), centre);
      const Vector used = j < count ? weight : Vector{};
      put(weights_ + j * padded_ + x, used);
      total += used;
    }
    for (int j = 0; j < most; ++j) {
      float* const weight = weights_ + j * padded_ + x;
      put(weight, vector_at(weight) / total);
    }
  }

  // How the values of a vector of places are found.
  enum class Pick { far, near, side_by_side };

  template <int kChannels>
  RK_STAGE void sum(const ConstRowSet& from, bool absent, const ImageRange& range,
                    const RowSet& to) const {
    if (!near_) {
      absent ? sum<kChannels, Pick::far, true, 0>(from, range, to)
             : sum<kChannels, Pick::far, false, 0>(from, range, to);
    } else if (absent) {
      sum<kChannels, Pick::near, true, 0>(from, range, to);
    } else if (side_by_side_ && most_ == 2) {
      sum<kChannels, Pick::side_by_side, false, 2>(from, range, to);
    } else if (most_ == 3) {
      sum<kChannels, Pick::near, false, 3>(from, range, to);
    } else {
      sum<kChannels, Pick::near, false, 0>(from, range, to);
    }
  }

  // Of kTaps taps, or of as many as there are where that is 0. All channels at once: they have
  // the same places and weights.
  template <int kChannels, Pick kPick, bool kAbsent, int kTaps>
  void sum(const ConstRowSet& given, const ImageRange& given_range, const RowSet& results) const {
    const ImageRange range = given_range;
    const int taps = kTaps ? kTaps : most_;
    const int64_t padded = padded_;
    const float* const weights = weights_;
    const int32_t *const firsts = firsts_, *const counts = counts_, *const bases = bases_;
    const float* from[kChannels];
    float* to[kChannels];
    for (int c = 0; c < kChannels; ++c) {
      from[c] = given.channel[c];
      to[c] = results.channel[c];
    }
    for (int64_t x = 0; x < padded; x += kVector) {
      const int64_t base = bases[x / kVector];
      const Integers first = integers_at(firsts + x);
      // pick(c, j, place): of a channel, for tap j.
      const auto sum_by = [&](const auto& pick) RK_INLINE {
        Vector sums[kChannels];
        const Vector weight = vector_at(weights + x);
        for (int c = 0; c < kChannels; ++c) sums[c] = weight * pick(c, 0, first);
#pragma GCC unroll 4
        for (int j = 1; j < taps; ++j) {
          const Integers used = j < integers_at(counts + x);
          Integers place = first + j;
          if constexpr (kPick == Pick::far) {
            place = used ? place : first;  // which may lie far behind the row
          }
          const Vector weight = vector_at(weights + j * padded + x);
          for (int c = 0; c < kChannels; ++c) {
            const Vector sum = sums[c] + weight * pick(c, j, place);
            if constexpr (kAbsent) {
              sums[c] = used ? sum : sums[c];
            } else {
              sums[c] = sum;
            }
          }
        }
        for (int c = 0; c < kChannels; ++c) put(to[c] + x, range.resampled(sums[c]));
      };
      if constexpr (kPick == Pick::side_by_side) {
        sum_by([=](int c, int j, Integers) RK_INLINE { return picked(from[c] + base + j, first); });
      } else if constexpr (kPick == Pick::near) {
        Picker pickers[kChannels];
        for (int c = 0; c < kChannels; ++c) pickers[c] = Picker(from[c] + base);
        sum_by([&](int c, int, Integers place) RK_INLINE { return pickers[c](place); });
      } else {
        sum_by([=](int c, int, Integers place)
                   RK_INLINE { return gathered(from[c] + base, place); });
      }
    }
  }

  int64_t places_ = 0, padded_ = 0;
  int most_ = 1;                            // taps of a place
  bool near_ = true, side_by_side_ = true;  // whether the first taps lie in one vector
  Room<float> weights_room_;
  Room<int32_t> firsts_room_, counts_room_, bases_room_;
  float* weights_ = nullptr;
  int32_t *firsts_ = nullptr, *counts_ = nullptr, *bases_ = nullptr;
};

class Box {
 public:
  // Of an image of height x width; rows will be asked for from column first() on, count() columns
  // of reach() rows at a time. `absent` says that values may be no numbers or infinite, which a
  // weight of 0 does not take away.
  void set(const BoxArguments& box, int channels, int height, int width, bool absent,
           const ImageRange& range) {
    absent_ = absent;
    box_ = box;
    channels_ = channels;
    height_ = height;
    range_ = range;
    rows_ = BoxAxis::of(box.height, box.out_height, box.flip_rows, box.filter, box.antialias);
    columns_ = BoxAxis::of(box.width, box.out_width, box.flip_columns, box.filter, box.antialias);
    const bool inside = box.left >= 0 && box.left + box.width <= width;
    first_ = inside ? box.left : 0;
    count_ = inside ? box.width : width;
    margin_ = columns_.takes_one() || box.antialias ? 0 : kMargin;
    beside_ = !inside || margin_ > 0;
    copies_ = columns_.copies() && !columns_.flip;
    if (!copies_) taps_.set(columns_);
    row_taps_.set(rows_);
    const int most = row_taps_.most();
    weights_ = weights_room_.at_least(most);
    pointers_ = pointers_room_.at_least(kMostChannels * most);
    sums_ = sums_room_.at_least(count_);
    for (int c = 0; c < channels; ++c) {
      memset(sums_.channel[c] + whole_vectors(count_), 0, kSlack * sizeof(float));
    }
    fill_row_ = fill_room_.at_least(count_);
    for (int c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < count_ + kSlack; ++x) fill_row_.channel[c][x] = box.fill[c];
    }
    if (beside_) set_places(width);
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int reach() const { return row_taps_.most(); }

  template <typename Source>
  void row(Source& source, int y, const RowSet& to) {
    const int most = row_taps_.most(), count = row_taps_.count(y);
    for (int j = 0; j < count; ++j) {
      weights_[j] = row_taps_.weight(y, j);
      const int k = rows_.inside(row_taps_.first(y) + j);
      const int at = padded_index(box_.top + k, height_, box_.pad);
      ConstRowSet row{};
      if (at >= 0) row = source.at(at);
      for (int c = 0; c < channels_; ++c) {
        pointers_[c * most + j] = at >= 0 ? row.channel[c] : fill_row_.channel[c];
      }
    }
    // Of all channels, so that what is written is out of the way before it is read again.
    ConstRowSet from{};
    for (int c = 0; c < channels_; ++c) from.channel[c] = pointers_[c * most];
    if (!rows_.takes_one()) {
      sum_channels(count, most);
      from = constant(sums_);
    }
    if (beside_) {
      for (int c = 0; c < channels_; ++c) spread(from.channel[c], box_.fill[c], row_.channel[c]);
      for (int c = 0; c < channels_; ++c) from.channel[c] = row_.channel[c] + margin_;
    }
    if (!copies_) return taps_.sum(from, channels_, absent_, range_, to);
    const ImageRange range = range_;
    for (int c = 0; c < channels_; ++c) {
      for (int64_t x = 0; x < box_.out_width; x += kVector) {
        put(to.channel[c] + x, range.resampled(vector_at(from.channel[c] + x)));
      }
    }
  }

 private:
  static constexpr int kMargin = 2;  // places beside the region that a filter reaches

  RK_STAGE void sum_channels(int count, int most) {
    for (int c = 0; c < channels_; ++c) {
      const float* const* const rows = pointers_ + c * most;
      if (count == 2) {
        sum_rows<2>(rows, weights_, count, count_, sums_.channel[c]);
      } else {
        sum_rows<0>(rows, weights_, count, count_, sums_.channel[c]);
      }
    }
  }

  // The columns of the image that the places from -margin on are, and which of them lie side by
  // side as they do.
  void set_places(int width) {
    const int64_t places = box_.width + 2 * margin_;
    row_ = row_room_.at_least(places);
    for (int c = 0; c < channels_; ++c) memset(row_.channel[c] + places, 0, kSlack * sizeof(float));
    columns_of_ = columns_room_.at_least(places);
    begin_ = end_ = 0;
    for (int64_t k = 0; k < places; ++k) {
      const int g = box_.left + columns_.inside(static_cast<int>(k) - margin_);
      columns_of_[k] = padded_index(g, width, box_.pad);
      const bool as_it_is = g >= 0 && g < width && k >= margin_ && k < places - margin_;
      if (!as_it_is) continue;
      if (end_ == 0) begin_ = k;
      end_ = k + 1;
    }
  }

  // `from` with what lies beside it.
  void spread(const float* from, float fill, float* to) const {
    const auto at = [&](int64_t k) {
      to[k] = columns_of_[k] < 0 ? fill : from[columns_of_[k] - first_];
    };
    const int64_t places = box_.width + 2 * margin_;
    for (int64_t k = 0; k < begin_; ++k) at(k);
    if (end_ > begin_) {
      memcpy(to + begin_, from + (columns_of_[begin_] - first_), (end_ - begin_) * sizeof(float));
    }
    for (int64_t k = end_; k < places; ++k) at(k);
  }

  BoxArguments box_{};
  int channels_ = 0, height_ = 0;
  ImageRange range_{};
  BoxAxis rows_{}, columns_{};
  int64_t first_ = 0, count_ = 0, begin_ = 0, end_ = 0;
  int margin_ = 0;
  bool beside_ = false, copies_ = false, absent_ = false;
  TapTable taps_, row_taps_;
  Room<float> weights_room_;
  Room<const float*> pointers_room_;
  Room<int32_t> columns_room_;
  RowRoom fill_room_, sums_room_, row_room_;
  RowSet fill_row_{}, sums_{}, row_{};
  float* weights_ = nullptr;
  const float** pointers_ = nullptr;
  int32_t* columns_of_ = nullptr;
};

}  // namespace
RK_NAMESPACE_END
