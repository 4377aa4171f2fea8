// One parameter's update by AdamW, Adam, SGDW or SGD, shared by the CPU and the CUDA kernels.
//
// D. Kingma, J. Ba, "Adam", ICLR 2015; I. Loshchilov, F. Hutter, "Decoupled weight decay
// regularization", ICLR 2019; S. Reddi et al., "On the convergence of Adam and beyond", ICLR 2018
// (amsgrad). The order of operations is that of torch.optim, so that results differ by roundings.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "elementary.h"
#include "philox.h"
#include "tensor_table.h"

namespace reg_kernels {

// Handed between files that are built for different instruction sets, as DType is. Numbered as
// reg_kernels/ops/optimizer_step.py numbers them. `average` leaves the parameter as it is and takes
// its moving average on: for one that has no gradient.
enum class Algorithm { adam, sgd, average };
enum class Decay { decoupled, decoupled_lr, l2 };
// How a parameter of 16 bits is stored; one of 32 or 64 has nothing to round.
enum class Rounding { nearest, stochastic, kahan };

// Which draw each element of a tensor takes. The elements of a shard are runs of the whole tensor's
// elements, `run` each, and their draws are those that the whole tensor's elements have.
struct DrawPlaces {
  int64_t offset;       // of element 0
  int64_t run, stride;  // a run of 0 stands for all elements

  RK_HD int64_t of(int64_t element) const {
    if (run == 0) return offset + element;
    return offset + element / run * stride + element % run;
  }

  // How many elements from this one on, of `count`, are side by side among the draws.
  RK_HD int64_t together(int64_t element, int64_t count) const {
    const int64_t left = run == 0 ? count : run - element % run;
    return left < count ? left : count;
  }

  // Whether so many elements that begin at a multiple of it take draws of one group.
  RK_HD bool in_whole_groups() const { return run == 0 && offset % kGroup == 0; }
};

// The hyperparameters of a group, as Python gives them.
struct OptimizerGroup {
  double lr;
  double decay_lr;  // the lr at which weight_decay is the whole decay, for Decay::decoupled_lr
  double weight_decay, l1;
  double beta1, beta2;  // SGD: momentum, dampening
  double eps;
  double ema_decay;
  const float* lr_on_device;  // takes the place of lr where it is not null
  Decay decay;
  bool maximize, nesterov;
};

// What one tensor's elements are updated with, in the precision that Python would compute it in;
// rounded to the compute type by OptimizerRule.
struct OptimizerConstants {
  double gradient;                 // multiplies the gradient: its sign, clipping, 1 / grad_scale
  double l2;                       // of the parameter, added to the gradient
  double keep;                     // multiplies the parameter: 1 - decay
  double threshold;                // of the proximal step for l1
  double momentum, momentum_rest;  // weights of the first moment's old and new value
  double beta2, beta2_rest;        // and of the second's
  double bias2;                    // sqrt(1 - beta2^step)
  double eps;
  double step_size;
  double ema_rest;  // 1 - ema_decay
  bool first;       // SGD: there is no momentum yet
  bool nesterov;
};

}  // namespace reg_kernels

RK_NAMESPACE_BEGIN

RK_HD DrawPlaces draw_places(const TensorTable& table, int64_t tensor) {
  return {table.at(TableRow::element_offset, tensor), table.at(TableRow::run, tensor),
          table.at(TableRow::run_stride, tensor)};
}

// `step` counts this update, from 1 on; `gradient` is what scaling and clipping multiply by.
RK_HD OptimizerConstants optimizer_constants(Algorithm algorithm, const OptimizerGroup& group,
                                             double step, double gradient) {
  const double lr = group.lr_on_device ? static_cast<double>(*group.lr_on_device) : group.lr;
  // What of the decays is in force: decoupled_lr follows the schedule of lr, not lr itself.
  const double rate = group.decay == Decay::decoupled_lr ? lr / group.decay_lr : lr;
  OptimizerConstants k{};
  k.gradient = group.maximize ? -gradient : gradient;
  k.l2 = group.decay == Decay::l2 ? group.weight_decay : 0.0;
  k.keep = group.decay == Decay::l2 ? 1.0 : 1.0 - rate * group.weight_decay;
  k.threshold = rate * group.l1;
  k.ema_rest = 1.0 - group.ema_decay;
  k.nesterov = group.nesterov;
  k.momentum = group.beta1;
  k.momentum_rest = 1.0 - (algorithm == Algorithm::adam ? group.beta1 : group.beta2);
  k.step_size = lr;
  if (algorithm == Algorithm::adam) {
    k.beta2 = group.beta2;
    k.beta2_rest = 1.0 - group.beta2;
    k.bias2 = sqrt(1.0 - pow(group.beta2, step));
    k.eps = group.eps;
    k.step_size = lr / (1.0 - pow(group.beta1, step));
  } else {
    k.first = step == 1.0;
  }
  return k;
}

// The factor of a gradient whose global norm, unscaled, is `norm`: torch's clip_grad_norm_.
RK_HD double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor < 1.0 ? factor : (factor >= 1.0 ? 1.0 : factor);  // NaN stays NaN
}

// The constants in the type that the elements are computed in.
template <typename C>
struct OptimizerRule {
  C gradient, l2, keep, threshold, momentum, momentum_rest, beta2, beta2_rest, bias2, eps,
      step_size, ema_rest;
  bool nesterov;
  bool from_gradient;  // the first moment is written as a step from the gradient, not towards it

  explicit RK_HD OptimizerRule(const OptimizerConstants& k, Algorithm algorithm)
      : gradient(static_cast<C>(k.gradient)),
        l2(static_cast<C>(k.l2)),
        keep(static_cast<C>(k.keep)),
        threshold(static_cast<C>(k.threshold)),
        momentum(static_cast<C>(k.momentum)),
        momentum_rest(static_cast<C>(k.momentum_rest)),
        beta2(static_cast<C>(k.beta2)),
        beta2_rest(static_cast<C>(k.beta2_rest)),
        bias2(static_cast<C>(k.bias2)),
        eps(static_cast<C>(k.eps)),
        step_size(static_cast<C>(k.step_size)),
        ema_rest(static_cast<C>(k.ema_rest)),
        nesterov(k.nesterov),
        from_gradient(algorithm == Algorithm::adam ? k.momentum_rest >= 0.5 : k.first) {
    // torch.lerp's two forms, each exact at its end: m + w (g - m), g + (w - 1) (g - m).
    if (algorithm == Algorithm::adam && from_gradient) momentum_rest -= C(1);
  }
};

// The gradient that the moments take, and the parameter after its decay. kCoupled: with the l2
// penalty's gradient; apart, since 0 p is not 0 where p is infinite.
template <bool kCoupled, typename C>
RK_HD C regularised_gradient(const OptimizerRule<C>& rule, C g, C p) {
  g *= rule.gradient;
  if constexpr (kCoupled) g = multiply_add(p, rule.l2, g);
  return g;
}

// m and v are the moments, and v_max their maximum so far where kAmsgrad says so.
template <bool kCoupled, bool kAmsgrad, typename C>
RK_HD void adam_element(const OptimizerRule<C>& rule, C& p, C g, C& m, C& v, C& v_max) {
  g = regularised_gradient<kCoupled>(rule, g, p);
  m = multiply_add(rule.momentum_rest, g - m, rule.from_gradient ? g : m);
  v = multiply_add(rule.beta2_rest * g, g, v * rule.beta2);
  C second = v;
  if constexpr (kAmsgrad) {
    v_max = v <= v_max || v_max != v_max ? v_max : v;  // NaN wins, as in torch.maximum
    second = v_max;
  }
  const C denominator = square_root(second) / rule.bias2 + rule.eps;
  p = p * rule.keep - rule.step_size * m / denominator;
}

// m is the momentum buffer, unused where kMomentum says so.
template <bool kCoupled, bool kMomentum, typename C>
RK_HD void sgd_element(const OptimizerRule<C>& rule, C& p, C g, C& m) {
  g = regularised_gradient<kCoupled>(rule, g, p);
  if constexpr (kMomentum) {
    m = rule.from_gradient ? g : multiply_add(g, rule.momentum_rest, m * rule.momentum);
    g = rule.nesterov ? multiply_add(m, rule.momentum, g) : m;
  }
  p = multiply_add(-rule.step_size, g, p * rule.keep);
}

// argmin_x (x - p)^2 / 2 + t |x|: what lies within t of zero becomes zero, exactly.
// N. Parikh, S. Boyd, "Proximal algorithms", 2014, section 6.5.2. NaN stays NaN.
template <typename C>
RK_HD C soft_threshold(C p, C t) {
  const C towards = p > C(0) ? p - t : p + t;
  const bool vanishes = p >= -t && p <= t;
  return vanishes ? C(0) : towards;
}

template <typename C>
RK_HD C ema_element(const OptimizerRule<C>& rule, C ema, C p) {
  return multiply_add(rule.ema_rest, p - ema, ema);
}

// What storing `value` as `stored` took off it; nothing where that is infinite, so that it stays
// so.
template <typename C>
RK_HD C lost_by_rounding(C value, C stored) {
  const C lost = value - stored;
  return lost - lost == C(0) ? lost : C(0);
}

// `value` as a bfloat16 that is one of its two neighbours, the nearer one the more probable: the
// expectation is `value`. `half_word` is a draw of 16 bits, as many as are dropped. What is already
// a bfloat16, zero above all, stays; NaN stays NaN and infinity infinite.
RK_HD bfloat16 store_stochastic(float value, uint32_t half_word) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t rounded = (bits + half_word) >> 16;
  return {static_cast<uint16_t>(finite ? rounded : Store<bfloat16>::from(value).bits)};
}

RK_NAMESPACE_END
