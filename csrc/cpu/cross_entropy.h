// What csrc/cpu/cross_entropy.cpp hands to the loops of csrc/cpu/cross_entropy.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/channel_layout.h"
#include "reg_kernels/cross_entropy_math.h"

namespace reg_kernels {

// Losses of logits, as cross-entropy and distillation share it. Positions are worked on in units,
// each of which has a sum of its own: threads do not change how losses are added up.
struct LossTask {
  DType dtype;
  const void* x;
  int64_t classes, length;  // length: positions of a sample
  bool classes_last;
  bool in_rows;             // whether the classes of a position are worked on together
  int64_t positions, unit;  // in all, and of a unit

  LabelOptions labels;  // where there are no probabilities
  LabelTotals totals;
  const void* probabilities;  // or null; in x's layout
  DType probabilities_dtype;
  double share;        // of a position that has probabilities
  const void* weight;  // of each class, in the type that is computed in, or null
  double weight_sum;

  void* stats;       // [2, positions], or [5, positions] of a distillation; read by a backward
  void* losses;      // of each position, or null
  double* partials;  // of each unit: the sum of its losses
  void* gradient;    // in x's layout, or null
  bool stream;       // whether the gradient is large enough for streaming stores

  const void* grad_output;  // backward: of each position or, with a stride of 0, of all
  int64_t grad_stride;

  int64_t units;  // in all
};

// Units [begin, end), forward or backward.
RK_DECLARE_LEAF(void, cross_entropy_units, (const LossTask& task, int64_t begin, int64_t end))
RK_DECLARE_LEAF(void, cross_entropy_backward_units,
                (const LossTask& task, int64_t begin, int64_t end))

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

// A class's probability as the loss takes it: smoothed.
template <typename C>
struct SmoothedTarget {
  C keep, smooth;

  explicit SmoothedTarget(const LossTask& task)
      : keep(static_cast<C>(1.0 - task.labels.smoothed_by())),
        smooth(static_cast<C>(task.labels.smoothed_by() / static_cast<double>(task.classes))) {}
  RK_HD C operator()(C q) const { return q * keep + smooth; }
};

RK_NAMESPACE_END
