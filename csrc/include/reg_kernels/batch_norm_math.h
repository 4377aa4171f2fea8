// BatchNorm's arithmetic a channel and an element at a time, shared by the CPU and CUDA kernels.
//
// S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015. Channel constants are made in double,
// once a channel; elements compute in their own type's compute type.
#pragma once

#include <cmath>
#include <cstdint>

#include "activation.h"
#include "dtypes.h"
#include "welford.h"

RK_NAMESPACE_BEGIN

// The moments of a channel of all values that it is normalised by.
struct ChannelMoments : Moments<double, double> {
  // Of no values at all it is 0, so that the constants of the channel are numbers.
  RK_HD double variance() const { return count > 0.0 ? m2 / count : 0.0; }
  // Whether the running statistics move: a single value has no unbiased variance.
  RK_HD bool moves() const { return count > 1.0; }
  RK_HD double unbiased() const { return m2 / (count - 1.0); }
};

// What a double has lost of a + b, which was rounded to `sum`; of an infinite one nothing is left.
RK_HD double rest_of_sum(double a, double b, double sum) {
  const double part = sum - a, rest = (a - (sum - part)) + (b - part);
  return rest - rest == 0.0 ? rest : 0.0;
}

// The moments of all ranks of a process group, [ranks][4][C]: each rank's count, mean, what the
// mean has lost by its rounding, and sum of squared deviations. Null where a rank's own batch is
// all there is.
struct GatheredMoments {
  const double* data;
  int64_t ranks;

  // Of channel c, merged in the order of ranks, so that every rank gets the same bits. A rank of no
  // values adds nothing. Means are merged as differences from the first one: a mean that is large
  // beside the deviation costs them no digits.
  RK_HD ChannelMoments of(int64_t channels, int64_t c) const {
    ChannelMoments all{};
    double base = 0.0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double* own = data + 4 * rank * channels + c;
      const double mean = own[channels];
      if (all.count == 0.0) base = mean - mean == 0.0 ? mean : 0.0;
      all.merge({own[0], (mean - base) + own[2 * channels], own[3 * channels]});
    }
    all.mean += base;
    return all;
  }
};

// y = (x - shift) scale + offset. The shift is the mean as C rounds it, and the offset makes up for
// the rounding: where the deviation is small beside the mean, x - shift is still exact. One
// multiply-add alone, x scale + offset, would lose as many digits as the mean is larger.
template <typename C>
struct ChannelAffine {
  C shift, scale, offset;

  static RK_HD ChannelAffine of(double mean, double invstd, double weight, double bias) {
    const C shift = static_cast<C>(mean);
    const double scale = invstd * weight;
    // Of an infinite mean there is no rest; x - shift is what it should be already.
    const double rest = mean - mean == 0.0 ? mean - static_cast<double>(shift) : 0.0;
    return {shift, static_cast<C>(scale), static_cast<C>(bias - rest * scale)};
  }

  RK_HD C operator()(C x) const { return (x - shift) * scale + offset; }
};

// 1 / sqrt(var + eps)
RK_HD double inverse_deviation(double variance, double eps) { return 1.0 / sqrt(variance + eps); }

// (1 - factor) running + factor batch, torch's momentum.
RK_HD double running_average(double running, double batch, double factor) {
  return (1.0 - factor) * running + factor * batch;
}

// The number of batches so far, one more; past the largest of an int64 it wraps around, as torch's.
template <typename Count>
RK_HD Count next_count(Count batches) {
  return static_cast<Count>(static_cast<uint64_t>(batches) + 1);
}

// The gradient's sums over a channel of M values, d being the gradient behind the activation:
// d_sum = sum d, dx_sum = sum d (x - shift). From them grad_input = (d + (x - shift) k2 + k3) k1,
// which is weight invstd (d - mean(d) - xhat mean(d xhat)). The scale stands outside: inside, a
// deviation of 1e30 would make k2 vanish.
template <typename C>
struct ChannelGradient {
  C shift, k1, k2, k3;

  static RK_HD ChannelGradient training(double mean, double invstd, double weight, double d_sum,
                                        double dx_sum, int64_t count) {
    const double rest = mean - static_cast<double>(static_cast<C>(mean));
    const double scale = weight * invstd;
    const double centred = dx_sum - rest * d_sum;  // sum d (x - mean)
    const double m = static_cast<double>(count);
    const double k2 = -invstd * invstd * centred / m;
    return {static_cast<C>(mean), static_cast<C>(scale), static_cast<C>(k2),
            static_cast<C>(-d_sum / m - k2 * rest)};
  }

  // The same from sums over all ranks, [2 C + 1]: of d, of d xhat, and their count.
  static RK_HD ChannelGradient of_ranks(double mean, double invstd, double weight,
                                        const double* sums, int64_t channels, int64_t c) {
    const double rest = mean - static_cast<double>(static_cast<C>(mean));
    const double m = sums[2 * channels];
    const double k2 = -invstd * sums[channels + c] / m;
    return {static_cast<C>(mean), static_cast<C>(weight * invstd), static_cast<C>(k2),
            static_cast<C>(-sums[c] / m - k2 * rest)};
  }

  // Frozen statistics do not depend on the input: the gradient is d times this, whatever x is.
  static RK_HD C frozen(double invstd, double weight) { return static_cast<C>(weight * invstd); }

  RK_HD C operator()(C d, C x) const { return (d + ((x - shift) * k2 + k3)) * k1; }

  // sum d xhat, the weight's gradient.
  static RK_HD double of_weight(double mean, double invstd, double d_sum, double dx_sum) {
    const double rest = mean - static_cast<double>(static_cast<C>(mean));
    return invstd * (dx_sum - rest * d_sum);
  }
};

// What a forward keeps for its backward, one bit an element, where it would be dear to rebuild:
// relu: whether the gradient passes, kept by dropout and not below zero; leaky_relu without
// dropout: whether it was above zero; else whether dropout kept it. There is a gate where something
// is dropped, or where the sign of a piecewise linear activation depends on a residual as well: the
// backward then need not read that again.
RK_HD constexpr bool has_gate(Activation activation, bool has_residual, bool drops) {
  return drops ||
         (has_residual && activation != Activation::none && is_piecewise_linear(activation));
}

// Whether the backward has to know z, what the activation was applied to.
RK_HD constexpr bool needs_preactivation(Activation activation, bool gated, bool drops) {
  if (activation == Activation::none || (gated && activation == Activation::relu)) return false;
  return !(gated && activation == Activation::leaky_relu && !drops);
}

RK_NAMESPACE_END
