// What csrc/cpu/batch_norm.cpp hands to the loops of csrc/cpu/batch_norm.simd.cpp.
//
// A tensor is cut into units, in one of two ways; either way threads read it in storage order,
// which is worth more here than reading a channel twice while the cache still holds it
// (bench/NOTES.md).
//
// planes: channels first, L long. A unit is a stretch of storage of `unit` elements, and has a pair
// of sums for each plane (n, c) that it has a part in.
//
// rows: channels last, or channels first with L short. The tensor is a matrix, a row the C channels
// of `fold` positions, or the C L values of one sample; a unit is `unit` rows of a strip of columns
// and has a pair of sums for each of those.
//
// Units depend on the shape alone, and their sums are added in order: the same bits for any number
// of threads.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/dtypes.h"

namespace reg_kernels {

struct BatchNormPlan {
  bool planes;
  int64_t unit, units;    // elements of a unit, or rows, and how many there are; a multiple of 8
  int64_t pairs;          // planes: pairs of sums that a unit has room for
  int64_t columns, rows;  // rows: of the matrix; whole rows alone
  int64_t rest;           // columns of one more row that is not whole
  int64_t strip, strips;  // columns a strip, and how many; units count strips first, then rows
};

struct BatchNormTask {
  BatchNormPlan plan;
  DType dtype;
  int64_t channels, length, count;  // C, L, M
  bool channels_last;

  // Tensors of the input's shape and storage order, or null.
  const void *x, *residual, *grad_output;
  void *y, *grad_input, *grad_residual;
  uint8_t* gate;  // its bits: planes: in storage order; rows: strip by strip, row by row
  bool stream;    // whether the outputs are large enough for streaming stores

  int64_t activation;  // an Activation
  double slope;
  bool drops;
  uint32_t threshold;  // DropoutRate
  double scale;
  uint64_t seed, offset;  // rng_state
  int64_t mask_offset;    // the mask index of element 0
  bool training;

  // Planes: [units][pairs][2]. Rows: [units of a strip + 1][2][columns], the last for the rest.
  double* partials;
  // For each channel, [3][C]: mean, sum of squared deviations and what the mean has lost by its
  // rounding; or the two sums of ChannelGradient.
  double* totals;
  // Channel constants, [3][C] each, rounded to the compute type already: shift, scale and offset of
  // ChannelAffine; k1, k2 and k3 of ChannelGradient.
  double* affine;
  double* gradient;
};

// A unit's sums into `partials`.
RK_DECLARE_LEAF(void, batch_norm_moments, (const BatchNormTask& task, int64_t unit))
RK_DECLARE_LEAF(void, batch_norm_gradient_sums, (const BatchNormTask& task, int64_t unit))
// The sums of channels [begin, end) into `totals`; `partials` is working space from then on.
RK_DECLARE_LEAF(void, batch_norm_merge_moments,
                (const BatchNormTask& task, int64_t begin, int64_t end))
RK_DECLARE_LEAF(void, batch_norm_merge_sums,
                (const BatchNormTask& task, int64_t begin, int64_t end))
// A unit's elements: y and gate, or grad_input and grad_residual.
RK_DECLARE_LEAF(void, batch_norm_map_forward, (const BatchNormTask& task, int64_t unit))
RK_DECLARE_LEAF(void, batch_norm_map_backward, (const BatchNormTask& task, int64_t unit))

}  // namespace reg_kernels
