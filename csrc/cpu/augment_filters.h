// BLUR and SHARPNESS: a row of the result is made of the rows around it, of whole ones at a time.
#pragma once

#include "augment_rows.h"

RK_NAMESPACE_BEGIN
namespace {

// to[x] = the sum of 2 radius + 1 terms in order, term k = weights[|k|] * at(k)[x]. Several vectors
// at a time, since each sum waits for the one before.
template <typename At>
RK_HD void sum_symmetric(int radius, const float* weights, int64_t width, const At& at, float* to) {
  int64_t x = 0;
  const auto run = [&]<int kVectors>() RK_INLINE {
    Vector sums[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      sums[j] = vector_at(at(-radius) + x + j * kVector) * weights[radius];
    }
    for (int k = 1 - radius; k <= radius; ++k) {
      const float* const from = at(k) + x;
      const float weight = weights[k < 0 ? -k : k];
      for (int j = 0; j < kVectors; ++j) sums[j] += vector_at(from + j * kVector) * weight;
    }
    for (int j = 0; j < kVectors; ++j) put(to + x + j * kVector, sums[j]);
    x += kVectors * kVector;
  };
  while (x + 8 * kVector <= width) run.template operator()<8>();
  while (x + 2 * kVector <= width) run.template operator()<2>();
  while (x < width) run.template operator()<1>();
}

class Blur {
 public:
  void set(const BlurArguments& blur, int channels, int height, int width,
           const ImageRange& range) {
    blur_ = blur;
    channels_ = channels;
    height_ = height;
    width_ = width;
    range_ = range;
    // Room for what is mirrored before a row, and behind it.
    row_ = room_.at_least(kBefore + whole_vectors(width) + kBefore + kSlack) + kBefore;
  }
  int reach() const { return blur_.rows ? 2 * blur_.radius + 1 : 1; }

  template <typename Source>
  RK_STAGE void row(Source& source, int y, const RowSet& to) {
    const int radius = blur_.radius;
    ConstRowSet rows[2 * kMostBlurRadius + 1];
    for (int k = -radius; k <= radius; ++k) {
      if (blur_.rows)
        rows[k + radius] = source.at(padded_index(y + k, height_, AugmentPad::reflect));
    }
    if (!blur_.rows) rows[0] = source.at(y);
    for (int c = 0; c < channels_; ++c) {
      float* const out = to.channel[c];
      float* const sums = blur_.columns ? row_ : out;
      if (blur_.rows) {
        sum_symmetric(
            radius, blur_.weights, width_,
            [&](int k) RK_INLINE { return rows[k + radius].channel[c]; }, sums);
      } else {
        memcpy(sums, rows[0].channel[c], width_ * sizeof(float));
      }
      if (blur_.columns) {
        for (int k = 1; k <= radius; ++k) {
          row_[-k] = row_[k];
          row_[width_ - 1 + k] = row_[width_ - 1 - k];
        }
        sum_symmetric(
            radius, blur_.weights, width_, [&](int k) RK_INLINE { return row_ + k; }, out);
      }
      for (int64_t x = 0; x < width_; x += kVector) {
        put(out + x, range_.resampled(vector_at(out + x)));
      }
    }
  }

 private:
  static constexpr int64_t kBefore = 16;

  BlurArguments blur_{};
  int channels_ = 0, height_ = 0, width_ = 0;
  ImageRange range_{};
  Room<float> room_;
  float* row_ = nullptr;
};

class Sharpness {
 public:
  void set(float rest, int channels, int height, int width, const ImageRange& range) {
    rest_ = rest;
    channels_ = channels;
    height_ = height;
    width_ = width;
    range_ = range;
  }
  int reach() const { return 3; }

  template <typename Source>
  RK_STAGE void row(Source& source, int y, const RowSet& to) {
    const bool changes = height_ > 2 && width_ > 2 && y > 0 && y < height_ - 1;
    ConstRowSet rows[3];
    for (int k = -1; changes && k <= 1; ++k) rows[k + 1] = source.at(y + k);
    const ConstRowSet own = source.at(y);
    for (int c = 0; c < channels_; ++c) {
      memcpy(to.channel[c], own.channel[c], width_ * sizeof(float));
      if (!changes) continue;
      float* const out = to.channel[c];
      const float last = out[width_ - 1];
      for (int64_t x = 1; x < width_ - 1; x += kVector) {
        Vector sum;
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            const float weight = i == 1 && j == 1 ? kSmoothCentre : kSmoothSide;
            const Vector term = vector_at(rows[i].channel[c] + x + j - 1) * weight;
            sum = i + j == 0 ? term : sum + term;
          }
        }
        put(out + x, sharpened(vector_at(own.channel[c] + x), sum, rest_, range_));
      }
      out[width_ - 1] = last;
    }
  }

 private:
  float rest_ = 0.0f;
  int channels_ = 0, height_ = 0, width_ = 0;
  ImageRange range_{};
};

}  // namespace
RK_NAMESPACE_END
