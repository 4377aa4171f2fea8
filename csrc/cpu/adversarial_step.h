// What csrc/cpu/adversarial_step.cpp hands to the loops of csrc/cpu/adversarial_step.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/adversarial_step_math.h"

namespace reg_kernels {

constexpr int64_t kAdversarialTile = 512;    // elements that are staged at a time
constexpr int64_t kAdversarialChunk = 8192;  // that are summed up by themselves

// N samples of `numel` elements side by side.
struct AdversarialTask {
  void* adv;  // written over
  const void *grad, *clean;
  DType dtype;
  BallNorm norm;
  int64_t numel;
  const SampleMove* moves;  // (N,)

  // ChannelNumbers' four in rows of `row_length`, of the type that is computed in. Either number c
  // of a row holds for elements [c length, (c + 1) length) of a sample, or number i for its i-th
  // one; then they start again after `period`, and the rows are longer than that by a tile.
  const void* rows;
  int64_t row_length, length, period;
  bool each;
};

// What one chunk of a sample adds to a norm: the squares, or the absolute values above the
// threshold and how many those are.
struct AdversarialSum {
  double total;
  int64_t count;
};

// Of elements [begin, end) of sample n, a chunk or what is left of one: of the gradients by pixels,
// or of the displacement that the sample's move leads to.
RK_DECLARE_LEAF(AdversarialSum, adversarial_sum,
                (const AdversarialTask& task, bool of_gradient, int64_t n, int64_t begin,
                 int64_t end))

// What the norm of a displacement in L2 is made of, for a step of any length: the sums of squares
// of the gradients and of what lies between clean and adv, in pixels, and of their products.
struct AdversarialProducts {
  double gradients, products, ways;
};

// Of elements [begin, end), likewise, in one pass. Not finite where an element is not.
RK_DECLARE_LEAF(AdversarialProducts, adversarial_products,
                (const AdversarialTask& task, int64_t n, int64_t begin, int64_t end))

// Elements [begin, end) of sample n of adv, one step further.
RK_DECLARE_LEAF(void, adversarial_move,
                (const AdversarialTask& task, int64_t n, int64_t begin, int64_t end))

}  // namespace reg_kernels
