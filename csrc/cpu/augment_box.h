// BOX: a region of an image, resampled. A row of the result is first a sum of the region's rows,
// whole ones at a time, and then of that row's places. What a place beside the image or the region
// holds is written beside the row, so that all taps of a place of the result lie side by side.
#pragma once

#include "augment_rows.h"

RK_NAMESPACE_BEGIN
namespace {

// to[x] = the sum of `count` rows with their weights, in order.
RK_STAGE void sum_rows(const float* const* rows, const float* weights, int count, int64_t width,
                       float* to) {
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
    near_ = true;
    most_ = 1;
    for (int64_t x = 0; x < padded_; x += kVector) {
      int32_t least = firsts_[x], end = 0;
      for (int64_t i = x; i < x + kVector; ++i) {
        least = static_cast<int32_t>(min(least, firsts_[i]));
        end = static_cast<int32_t>(max(end, firsts_[i] + counts_[i]));
        most_ = static_cast<int>(max(most_, counts_[i]));
      }
      bases_[x / kVector] = least;
      for (int64_t i = x; i < x + kVector; ++i) firsts_[i] -= least;
      near_ = near_ && end - least <= kPicked;
    }
  }

  int most() const { return most_; }
  int first(int64_t x) const { return bases_[x / kVector] + firsts_[x]; }
  int count(int64_t x) const { return counts_[x]; }
  float weight(int64_t x, int j) const { return weights_[j * padded_ + x]; }

  // to[x] = the sum of from[k] over the taps k of x. What is read behind the last tap counts 0;
  // `absent` says that it may be no number.
  RK_STAGE void sum(const float* from, bool absent, const ImageRange& range, float* to) const {
    if (!near_) {
      absent ? sum<false, true, 0>(from, range, to) : sum<false, false, 0>(from, range, to);
    } else if (absent) {
      sum<true, true, 0>(from, range, to);
    } else if (most_ == 2) {
      sum<true, false, 2>(from, range, to);
    } else if (most_ == 3) {
      sum<true, false, 3>(from, range, to);
    } else {
      sum<true, false, 0>(from, range, to);
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

  // Of kTaps taps, or of as many as there are where that is 0.
  template <bool kNear, bool kAbsent, int kTaps>
  void sum(const float* from, const ImageRange& given, float* to) const {
    const ImageRange range = given;
    const int taps = kTaps ? kTaps : most_;
    const int64_t padded = padded_;
    const float* const weights = weights_;
    const int32_t *const firsts = firsts_, *const counts = counts_, *const bases = bases_;
    for (int64_t x = 0; x < padded; x += kVector) {
      const float* const at = from + bases[x / kVector];
      const Integers first = integers_at(firsts + x);
      const auto sum_by = [&](const auto& pick) RK_INLINE {
        Vector sum = vector_at(weights + x) * pick(first);
#pragma GCC unroll 4
        for (int j = 1; j < taps; ++j) {
          const Integers used = j < integers_at(counts + x);
          Integers place = first + j;
          if constexpr (!kNear) place = used ? place : first;  // which may lie far behind the row
          const Vector term = vector_at(weights + j * padded + x) * pick(place);
          if constexpr (kAbsent) {
            sum = used ? sum + term : sum;
          } else {
            sum += term;
          }
        }
        put(to + x, range.resampled(sum));
      };
      if constexpr (kNear) {
        sum_by(Picker(at));
      } else {
        sum_by([=](Integers index) RK_INLINE { return gathered(at, index); });
      }
    }
  }

  int64_t places_ = 0, padded_ = 0;
  int most_ = 1;  // taps of a place
  bool near_ = true;
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
    ConstRowSet summed{};
    for (int c = 0; c < channels_; ++c) {
      summed.channel[c] = rows_.takes_one() ? pointers_[c * most] : sums_.channel[c];
      if (rows_.takes_one()) continue;
      sum_rows(pointers_ + c * most, weights_, count, count_, sums_.channel[c]);
    }
    for (int c = 0; c < channels_; ++c) {
      const float* from = summed.channel[c];
      if (beside_) from = spread(from, box_.fill[c]);
      if (copies_) {
        const ImageRange range = range_;
        for (int64_t x = 0; x < box_.out_width; x += kVector) {
          put(to.channel[c] + x, range.resampled(vector_at(from + x)));
        }
      } else {
        taps_.sum(from, absent_, range_, to.channel[c]);
      }
    }
  }

 private:
  static constexpr int kMargin = 2;  // places beside the region that a filter reaches

  // The columns of the image that the places from -margin on are, and which of them lie side by
  // side as they do.
  void set_places(int width) {
    const int64_t places = box_.width + 2 * margin_;
    row_ = row_room_.at_least(places + kSlack);
    memset(row_ + places, 0, kSlack * sizeof(float));
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
  const float* spread(const float* from, float fill) {
    const auto at = [&](int64_t k) {
      row_[k] = columns_of_[k] < 0 ? fill : from[columns_of_[k] - first_];
    };
    const int64_t places = box_.width + 2 * margin_;
    for (int64_t k = 0; k < begin_; ++k) at(k);
    if (end_ > begin_) {
      memcpy(row_ + begin_, from + (columns_of_[begin_] - first_), (end_ - begin_) * sizeof(float));
    }
    for (int64_t k = end_; k < places; ++k) at(k);
    return row_ + margin_;
  }

  BoxArguments box_{};
  int channels_ = 0, height_ = 0;
  ImageRange range_{};
  BoxAxis rows_{}, columns_{};
  int64_t first_ = 0, count_ = 0, begin_ = 0, end_ = 0;
  int margin_ = 0;
  bool beside_ = false, copies_ = false, absent_ = false;
  TapTable taps_, row_taps_;
  Room<float> weights_room_, row_room_;
  Room<const float*> pointers_room_;
  Room<int32_t> columns_room_;
  RowRoom fill_room_, sums_room_;
  RowSet fill_row_{}, sums_{};
  float *weights_ = nullptr, *row_ = nullptr;
  const float** pointers_ = nullptr;
  int32_t* columns_of_ = nullptr;
};

}  // namespace
RK_NAMESPACE_END
