// The cross-entropy of one position, for the CPU and the CUDA kernels.
//
// With labels a and b, of shares A and B, smoothing e over C classes of weights w (sum W):
//   loss = ka l(a) + kb l(b) + u sum_c w_c l(c),  l(c) = log sum - (x_c - max)
//   ka = A (1 - e) w_a,  kb = B (1 - e) w_b,  u = (A + B) e / C
//   d loss / d x_c = (ka + kb + u W) p_c - u w_c - [c = a] ka - [c = b] kb
// A share is lambda, or 1 - lambda, over what a mean divides by; that of an ignored label is 0. A
// label that counts and has a share of 0 still has a part in the loss, 0 l: NaN of an infinite l.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "softmax.h"

RK_NAMESPACE_BEGIN

enum class Reduction { none, mean, sum };  // torch's numbers

// The labels of a loss and what they count for, as all positions share it.
struct LabelOptions {
  const int64_t* labels;          // one a position; or null: no position has one
  const int64_t* partner_labels;  // or null: then there is one label, of share 1
  ChannelValues lam;              // of each sample, or of all where `one_lam_for_all`
  bool one_lam_for_all;           // lam is one number, or null and `one_lam` counts
  double one_lam;
  int64_t positions;  // of a sample
  int64_t classes;
  int64_t ignore_index;
  double smoothing;
  const double* traced_smoothing;  // null, or what counts instead, where the kernels read

  RK_HD double smoothed_by() const { return traced_smoothing ? *traced_smoothing : smoothing; }
  RK_HD bool smooths() const { return traced_smoothing || smoothing > 0; }
  RK_HD double lam_of(int64_t position) const {
    return lam.at(one_lam_for_all ? 0 : position / positions, one_lam);
  }
  RK_HD bool is_ignored(int64_t label) const { return label == ignore_index; }
  RK_HD bool is_valid(int64_t label) const {
    return (label >= 0 && label < classes) || is_ignored(label);
  }
};

// What the weights of the labels that count sum up to: a mean divides by it; 1 without a mean.
struct LabelTotals {
  double labels, partner_labels;
};

// What one position's labels make of its logits. A label that is absent or ignored is -1.
template <typename C>
struct LabelTerms {
  int64_t a, b;
  C ka, kb;
  C smooth;          // u
  C mass;            // ka + kb + u W
  bool of_no_share;  // whether a label that counts has a share of 0, and there is smoothing

  // `weight` (C,) or null; `weight_sum` is W: C without weights. A kernel for losses without
  // smoothing has it for a constant, which saves registers.
  template <bool kSmooths = true>
  static RK_HD LabelTerms at(const LabelOptions& options, const LabelTotals& totals,
                             const C* weight, double weight_sum, int64_t position) {
    const bool pair = options.partner_labels != nullptr;
    const double lam = pair ? options.lam_of(position) : 1.0;
    const double smoothing = kSmooths ? options.smoothed_by() : 0.0;
    double shares = 0;
    LabelTerms terms{-1, -1, 0, 0, 0, 0, false};
    const auto add = [&](int64_t label, double share, int64_t& at, C& k) {
      if (options.is_ignored(label)) return;
      const double w = weight ? static_cast<double>(weight[label]) : 1.0;
      at = label;
      shares += share;
      k = static_cast<C>(share * (1.0 - smoothing) * w);
      if (share == 0 && smoothing > 0) terms.of_no_share = true;
    };
    if (options.labels) add(options.labels[position], lam / totals.labels, terms.a, terms.ka);
    if (pair) {
      add(options.partner_labels[position], (1.0 - lam) / totals.partner_labels, terms.b, terms.kb);
    }
    terms.smooth = static_cast<C>(shares * smoothing / static_cast<double>(options.classes));
    // As `slope_of_label` adds them up: the gradient of one class alone is then 0.
    terms.mass = (terms.ka + terms.kb) + terms.smooth * static_cast<C>(weight_sum);
    return terms;
  }

  RK_HD bool is_nothing() const { return a < 0 && b < 0; }
  // Whether the loss asks for all classes.
  RK_HD bool smooths() const { return smooth != 0 || of_no_share; }

  // `x_a` and `x_b` are logits; `smooth_sum` = sum_c w_c (x_c - max), where there is smoothing.
  RK_HD double loss(const SoftmaxSum<C>& softmax, C x_a, C x_b, double smooth_sum,
                    double weight_sum) const {
    const C log_sum = logarithm(softmax.sum);
    double total = 0;
    if (a >= 0) total += static_cast<double>(ka) * (log_sum - (x_a - softmax.max));
    if (b >= 0) total += static_cast<double>(kb) * (log_sum - (x_b - softmax.max));
    if (smooths()) {
      const double of_all = weight_sum * log_sum - smooth_sum;
      if (smooth != 0) total += static_cast<double>(smooth) * of_all;
      if (of_no_share) total += 0.0 * of_all;
    }
    return total;
  }

  // d loss / d x_c of a class of softmax p and weight w that may be a label.
  RK_HD C slope_of_label(int64_t c, C p, C w) const {
    const C own = (c == a ? ka : C(0)) + (c == b ? kb : C(0));
    return mass * p - (own + smooth * w);
  }
};

RK_NAMESPACE_END
