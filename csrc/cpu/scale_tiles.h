// The factors of a layer scale as loops over a tile of elements read them.
#pragma once

#include "reg_kernels/elementwise.h"
#include "stream.h"

RK_NAMESPACE_BEGIN

// Of an op without one.
template <typename C, bool kScales>
struct ScaleTiles {
  template <typename Factor>
  ScaleTiles(const LayerScale&, const Factor&) {}
};

// Side by side, one for each element. Where the channels come round soon they are made once, in
// such number that a tile can start in any place; else tile by tile.
template <typename C>
class ScaleTiles<C, true> {
 public:
  // Elements of a tile. Factors that were just stored can be read when the streaming stores before
  // them are done: tiles of 512 took 1.4 times as long (7 x 7 positions, bfloat16, 64 MiB).
  static constexpr int64_t kCount = 2048;

  // Each is a channel's times `scale`.
  ScaleTiles(const LayerScale& of, C scale) : of_(of), scale_(scale) {
    const int64_t period = of.channels * of.inner;
    if (of.values == nullptr || same() || period > kCount) return;
    fill(0, period + kCount);
    period_ = period;
  }

  bool any() const { return of_.values != nullptr; }

  // Whether so many elements have one factor that a loop over them, whose ends are slow, is faster
  // than one that reads factors: for 1024 it is, for 600 in 16 bits it is not.
  bool same() const { return of_.inner >= kCount / 2; }
  FactorCursor<C> cursor(int64_t first) const { return {of_, first}; }
  C times(C value) const { return value * scale_; }

  // Those of elements [first, first + count), up to a tile.
  RK_HD const C* tile(int64_t first, int64_t count) {
    if (period_ != 0) return factors_ + first % period_;
    fill(first, count);
    return factors_;
  }

 private:
  static constexpr int64_t kBlock = kLine / static_cast<int64_t>(sizeof(C));

  void fill(int64_t first, int64_t count) {
    FactorCursor<C> at = cursor(first);
    for (int64_t i = 0; i < count;) {
      const int64_t run = min(at.run(), count - i);
      const C* const values = at.values();
      if (at.same()) {  // in whole blocks: what is too much, the next run writes over
        const C value = times(*values);
        for (int64_t j = 0; j < run; j += kBlock) {
          for (int64_t k = 0; k < kBlock; ++k) factors_[i + j + k] = value;
        }
      } else {
        for (int64_t j = 0; j < run; ++j) factors_[i + j] = times(values[j]);
      }
      at.advance(run);
      i += run;
    }
  }

  LayerScale of_;
  C scale_;
  int64_t period_ = 0;  // of what `factors_` repeats, or 0
  alignas(kLine) C factors_[2 * kCount + kBlock];
};

RK_NAMESPACE_END
