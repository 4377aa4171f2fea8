// One position of a distillation: what is gathered of its classes, and what is made of that.
#pragma once

#include "reg_kernels/device_assert.cuh"
#include "reg_kernels/distillation_math.h"
#include "reg_kernels/softmax.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// What temperature and alpha make of a loss that is a mean of `mean_of` positions, or of 1: a sum.
template <typename C>
struct DistillationFactors {
  C inverse_temperature;
  double of_divergence;  // alpha T^2 / mean_of
  double of_labels;      // 1 - alpha
  C divergence_slope;    // alpha T / mean_of

  DistillationFactors() = default;
  RK_HD DistillationFactors(double temperature, double alpha, int64_t mean_of) {
    const double share = alpha / static_cast<double>(mean_of);
    inverse_temperature = static_cast<C>(1.0 / temperature);
    of_divergence = share * temperature * temperature;
    of_labels = 1.0 - alpha;
    divergence_slope = static_cast<C>(share * temperature);
  }
};

// S and T are the element types of student and teacher.
template <typename S, typename T>
struct DistillationArguments {
  using C = compute_t<S>;

  const S* x;        // (N, C, ...), the student's logits
  const T* teacher;  // the teacher's, in x's layout
  int64_t positions;
  int64_t classes;
  int64_t length;  // positions of a sample where classes lie apart, that far; else 1
  LabelOptions labels;
  const C* weight;  // (C,), or null
  DistillationFactors<C> known;
  const double* traced;  // null, or temperature and alpha: `known` is void then
  int64_t mean_of;

  const TargetSums* target_sums;  // or null: no mean, and no weights to smooth over

  bool forward;  // writes stats and losses; else it reads stats
  C* stats;      // (5, N, ...)
  C* losses;     // (N, ...), or null where they are summed up
  LossSum<C> sum;

  S* gradient;                // in x's layout, or null
  ChannelValues grad_output;  // (N, ...), or one of all, or null for 1
  bool one_grad_output;

  int threads;  // that work on one position
  int room;     // elements of x, and of teacher, that a block has shared memory for

  __device__ C grad_output_of(int64_t position) const {
    return static_cast<C>(grad_output.at(one_grad_output ? 0 : position, 1.0));
  }
  // A compiler drops what a caller has no use for.
  __device__ DistillationFactors<C> factors() const {
    return traced ? DistillationFactors<C>(traced[0], traced[1], mean_of) : known;
  }
  __device__ TargetSums sums() const {
    return target_sums ? *target_sums : TargetSums{{1, 1}, static_cast<double>(labels.classes)};
  }
  // Where a position's class 0 lies.
  __device__ int64_t start(int64_t position) const {
    const int64_t n = position / length;
    return n * classes * length + (position - n * length);
  }
};

// exp(above) and exp(above / T), one from the other where a usual temperature allows.
template <typename S, typename C = compute_t<S>>
struct Exponentials {
  C at_1, at_t;

  __device__ Exponentials(C above, C inverse_temperature)
      : at_t(softmax_exponential<S>(above * inverse_temperature)) {
    at_1 = inverse_temperature == C(0.5) ? at_t * at_t
           : inverse_temperature == C(1) ? at_t
                                         : softmax_exponential<S>(above);
  }
};

// What has been seen of a position, relative to the largest values that have been.
template <typename S, typename C = compute_t<S>>
struct DistillationSums {
  C max = kLowest<C>, sum = 0, sum_at_t = 0;    // the student's
  C teacher_max = kLowest<C>, teacher_sum = 0;  // the teacher's, at T
  C z = 0;                                      // T times the Z of distillation_math.h
  double smooth = 0;                            // sum_c w_c x_c, where there is smoothing

  // To largest values that are no smaller than its own. A term e ((t - max_t) - (x - max_x)) has
  // its e scaled, and its difference moved by as much as the two maxima move apart. Without a
  // teacher's value seen there are no terms, and the maxima need not have a finite difference.
  __device__ void raise(C to, C teacher_to, C inverse_temperature) {
    const C by = max - to, teacher_by = teacher_max - teacher_to;
    const C factor = exponential_below(teacher_by * inverse_temperature);
    if (teacher_sum > 0) z += teacher_sum * (teacher_by - by);
    z *= factor;
    teacher_sum *= factor;
    sum *= exponential_below(by);
    sum_at_t *= exponential_below(by * inverse_temperature);
    max = to;
    teacher_max = teacher_to;
  }

  template <int kCount>
  __device__ void add(const C (&x)[kCount], const C (&teacher)[kCount], C inverse_temperature) {
    C to = max, teacher_to = teacher_max;
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      to = larger(to, x[j]);
      teacher_to = larger(teacher_to, teacher[j]);
    }
    if (to > max || teacher_to > teacher_max) raise(to, teacher_to, inverse_temperature);
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const C above = x[j] - max, teacher_above = teacher[j] - teacher_max;
      const Exponentials<S> of_x(above, inverse_temperature);
      sum += of_x.at_1;
      sum_at_t += of_x.at_t;
      const C e = softmax_exponential<S>(teacher_above * inverse_temperature);
      teacher_sum += e;
      z += divergence_term(e, teacher_above, above);
    }
  }
};

// What is asked of the labels of a position, before its classes are.
template <typename C>
struct PositionTerms {
  LabelTerms<C> labels;
  C x_a, x_b;
  C grad_output;
};

template <typename S, typename T, typename C = compute_t<S>>
__device__ __forceinline__ PositionTerms<C> position_terms(const DistillationArguments<S, T>& a,
                                                           int64_t position) {
  if (a.labels.labels) RK_ASSERT(a.labels.is_valid(a.labels.labels[position]));
  RK_ASSERT(!a.labels.partner_labels || a.labels.is_valid(a.labels.partner_labels[position]));
  PositionTerms<C> terms;
  const TargetSums sums = a.sums();
  terms.labels = LabelTerms<C>::at(a.labels, sums.labels, a.weight, sums.weights, position);
  const S* const x = a.x + a.start(position);
  terms.x_a = terms.labels.a < 0 ? C(0) : load(x[terms.labels.a * a.length]);
  terms.x_b = terms.labels.b < 0 ? C(0) : load(x[terms.labels.b * a.length]);
  terms.grad_output = a.grad_output_of(position);
  return terms;
}

// The loss of a position, and its stats written.
template <typename S, typename T, typename C = compute_t<S>>
__device__ __forceinline__ double finish_position(const DistillationArguments<S, T>& a,
                                                  int64_t position, const PositionTerms<C>& terms,
                                                  const DistillationSums<S>& sums) {
  C* const stats = a.stats + position;
  stats[0] = sums.max;
  stats[a.positions] = sums.sum;
  stats[2 * a.positions] = sums.sum_at_t;
  stats[3 * a.positions] = sums.teacher_max;
  stats[4 * a.positions] = sums.teacher_sum;
  const double weights = a.sums().weights;
  const DistillationFactors<C> factors = a.factors();
  const double of_labels =
      terms.labels.loss({sums.max, sums.sum}, terms.x_a, terms.x_b,
                        sums.smooth - weights * static_cast<double>(sums.max), weights);
  const double kl =
      divergence<C>({sums.teacher_max, sums.teacher_sum}, {sums.max, sums.sum_at_t},
                    static_cast<double>(sums.z) * static_cast<double>(factors.inverse_temperature));
  const double loss = factors.of_divergence * kl + factors.of_labels * of_labels;
  if (a.losses) a.losses[position] = static_cast<C>(loss);
  return loss;
}

// d loss / d x_c = at_t e(x_c) - teacher e(t_c) + at_1 exp(x_c - max) - smooth w_c - [c = a] ka -
// [c = b] kb, e(x) = exp((x - max) / T).
template <typename S, typename C = compute_t<S>>
struct DistillationSlopes {
  C max, teacher_max;
  C at_t, teacher, at_1, smooth, ka, kb;
  C inverse_temperature;
  int64_t a, b;

  __device__ DistillationSlopes(const PositionTerms<C>& terms, const DistillationSums<S>& sums,
                                const DistillationFactors<C>& factors)
      : max(sums.max),
        teacher_max(sums.teacher_max),
        inverse_temperature(factors.inverse_temperature),
        a(terms.labels.a),
        b(terms.labels.b) {
    const C share = factors.divergence_slope * terms.grad_output;
    at_t = share / sums.sum_at_t;
    teacher = share / sums.teacher_sum;
    const C factor = static_cast<C>(factors.of_labels) * terms.grad_output;
    at_1 = factor * terms.labels.mass / sums.sum;
    smooth = factor * terms.labels.smooth;
    ka = factor * terms.labels.ka;
    kb = factor * terms.labels.kb;
  }

  __device__ C at(C x, C t, C weight) const {
    const Exponentials<S> of_x(x - max, inverse_temperature);
    const C e = softmax_exponential<S>((t - teacher_max) * inverse_temperature);
    return (at_t * of_x.at_t - teacher * e) + (at_1 * of_x.at_1 - smooth * weight);
  }

  __device__ bool has_label(int64_t first, int count) const {
    return (a >= first && a < first + count) || (b >= first && b < first + count);
  }
  __device__ C of_label(int64_t c) const { return (c == a ? ka : C(0)) + (c == b ? kb : C(0)); }
};

template <typename S, typename T, typename C = compute_t<S>>
__device__ __forceinline__ DistillationSums<S> read_stats(const DistillationArguments<S, T>& a,
                                                          int64_t position) {
  const C* const stats = a.stats + position;
  DistillationSums<S> sums;
  sums.max = stats[0];
  sums.sum = stats[a.positions];
  sums.sum_at_t = stats[2 * a.positions];
  sums.teacher_max = stats[3 * a.positions];
  sums.teacher_sum = stats[4 * a.positions];
  return sums;
}

// Classes [c, c + kCount) of a position, as they are computed with.
template <typename S, typename T, int kCount, typename C = compute_t<S>>
struct DistillationLogits {
  C x[kCount], teacher[kCount];

  __device__ DistillationLogits(const Vector<S, kCount>& xs, const Vector<T, kCount>& teachers) {
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      x[j] = load(xs.v[j]);
      teacher[j] = static_cast<C>(load(teachers.v[j]));
    }
  }

  __device__ void add_to(DistillationSums<S>& sums, const DistillationArguments<S, T>& a,
                         C inverse_temperature, int64_t c) const {
    sums.add(x, teacher, inverse_temperature);
    if (!a.labels.smooths()) return;
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const C weight = a.weight ? a.weight[c + j] : C(1);
      sums.smooth += static_cast<double>(weight) * static_cast<double>(x[j]);
    }
  }

  __device__ Vector<S, kCount> gradient(const DistillationSlopes<S>& slopes,
                                        const DistillationArguments<S, T>& a, int64_t c) const {
    const bool weighs = a.weight && a.labels.smooths();
    C slope[kCount];
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      slope[j] = slopes.at(x[j], teacher[j], weighs ? a.weight[c + j] : C(1));
    }
    if (slopes.has_label(c, kCount)) {
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) slope[j] -= slopes.of_label(c + j);
    }
    Vector<S, kCount> result;
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) result.v[j] = store<S>(slope[j]);
    return result;
  }
};

}  // namespace cuda
RK_NAMESPACE_END
