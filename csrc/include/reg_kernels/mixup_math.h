// One element of mixup and CutMix, for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "bytes.h"
#include "dtypes.h"
#include "elementary.h"

RK_NAMESPACE_BEGIN

// Of a byte of an image the 1/255 is part of the scale that follows.

// What a sample and its partner count for, each rounded to C once.
template <typename C>
struct MixupWeights {
  C own, partner;

  static RK_HD MixupWeights of(double lam) {
    return {static_cast<C>(lam), static_cast<C>(1.0 - lam)};
  }

  // A weight of 1 or 0 takes one of the two, whatever the other holds: such samples are copied.
  RK_HD bool keeps() const { return partner == 0; }
  RK_HD bool replaces() const { return own == 0; }

  RK_HD C blend(C x, C y) const { return own * x + partner * y; }
};

// A box of columns [x1, x2) and rows [y1, y2), in which a sample takes its partner's values.
struct MixupBox {
  int64_t x1, y1, x2, y2;

  // Of the four int64 at `box`, or an empty one where there are none.
  static RK_HD MixupBox at(const int64_t* box) {
    if (box == nullptr) return {0, 0, 0, 0};
    return {box[0], box[1], box[2], box[3]};
  }

  RK_HD bool is_empty() const { return x1 >= x2 || y1 >= y2; }
  RK_HD bool has_row(int64_t row) const { return row >= y1 && row < y2; }
  RK_HD bool fits(int64_t height, int64_t width) const {
    return 0 <= x1 && x1 <= x2 && x2 <= width && 0 <= y1 && y1 <= y2 && y2 <= height;
  }
};

// How the samples of a batch are mixed.
struct MixupBlend {
  int64_t samples, height, width;  // boxes lie in the last two dimensions
  ChannelValues lam;               // of each sample, or of all where `one_lam_for_all`
  bool one_lam_for_all;            // lam is one number, or null and `one_lam` counts
  double one_lam;
  const int64_t* index;  // each sample's partner, or null: the batch reversed
  const int64_t* boxes;  // four each, or null
  bool one_box;          // for all samples

  RK_HD double lam_of(int64_t n) const { return lam.at(one_lam_for_all ? 0 : n, one_lam); }
  RK_HD int64_t partner_of(int64_t n) const { return index ? index[n] : samples - 1 - n; }
  RK_HD MixupBox box_of(int64_t n) const {
    return MixupBox::at(boxes == nullptr || one_box ? boxes : boxes + 4 * n);
  }
};

RK_NAMESPACE_END
