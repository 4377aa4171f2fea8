// One position of a distillation: what is gathered of its classes, and what is made of that.
#pragma once

#include <algorithm>

#include "reg_kernels/distillation_math.h"
#include "reg_kernels/loss_backward.cuh"

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

// Classes before the first use of one, where they lie apart.
template <typename C>
constexpr int kDistillationClasses = sizeof(C) == 8 ? 2 : 4;

// Logits of classes side by side, the student's and the teacher's.
template <typename S, typename T, int kWidth>
struct DistillationPair {
  Vector<S, kWidth> x;
  Vector<T, kWidth> teacher;
};

// S and T are the element types of student and teacher. `stats` has 5 of a position, in the order
// of finish_position.
template <typename S, typename T>
struct DistillationArguments : LossArguments<S> {
  using C = compute_t<S>;
  static constexpr int kCount = std::min(kVector<S>, kVector<T>);
  template <int kWidth>
  using Logits = DistillationPair<S, T, kWidth>;

  const T* teacher;  // in x's layout
  double temperature, alpha;
  const double* traced;  // null, or the two on the device, which then count instead

  DistillationFactors<C> known;  // the launcher's: where nothing is traced

  // A compiler drops what a caller has no use for.
  __device__ DistillationFactors<C> factors() const {
    return traced ? DistillationFactors<C>(traced[0], traced[1], this->mean_of()) : known;
  }

  int64_t most_vectors() const { return most_row_vectors(this->x, this->classes, kCount); }
  __device__ Logits<kCount> load_row(int64_t first, int64_t c, int64_t classes) const {
    return {load_logits<kCount>(this->x + first, c, classes),
            load_logits<kCount>(teacher + first, c, classes)};
  }
  __device__ Logits<1> load_class(int64_t element) const {
    return {{{this->x[element]}}, {{teacher[element]}}};
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

// The loss of a position, and its stats written.
template <typename S, typename T, typename C = compute_t<S>>
__device__ __forceinline__ double finish_position(const DistillationArguments<S, T>& a,
                                                  int64_t position, const Position<C>& target,
                                                  const DistillationSums<S>& sums) {
  C* const stats = a.stats + position;
  stats[0] = sums.max;
  stats[a.positions] = sums.sum;
  stats[2 * a.positions] = sums.sum_at_t;
  stats[3 * a.positions] = sums.teacher_max;
  stats[4 * a.positions] = sums.teacher_sum;
  const double weights = a.target_sums().weights;
  const DistillationFactors<C> factors = a.factors();
  const double of_labels =
      target.terms.loss({sums.max, sums.sum}, target.x_a, target.x_b,
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

  __device__ DistillationSlopes(const Position<C>& target, const DistillationSums<S>& sums,
                                const DistillationFactors<C>& factors, C factor)
      : max(sums.max),
        teacher_max(sums.teacher_max),
        inverse_temperature(factors.inverse_temperature),
        a(target.terms.a),
        b(target.terms.b) {
    const C share = factors.divergence_slope * factor;
    at_t = share / sums.sum_at_t;
    teacher = share / sums.teacher_sum;
    const C of_labels = static_cast<C>(factors.of_labels) * factor;
    at_1 = of_labels * target.terms.mass / sums.sum;
    smooth = of_labels * target.terms.smooth;
    ka = of_labels * target.terms.ka;
    kb = of_labels * target.terms.kb;
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

  explicit __device__ DistillationLogits(const DistillationPair<S, T, kCount>& pair) {
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) set(j, pair.x.v[j], pair.teacher.v[j]);
  }
  explicit __device__ DistillationLogits(const DistillationPair<S, T, 1> (&pairs)[kCount]) {
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) set(j, pairs[j].x.v[0], pairs[j].teacher.v[0]);
  }
  __device__ void set(int j, S of_x, T of_teacher) {
    x[j] = load(of_x);
    teacher[j] = static_cast<C>(load(of_teacher));
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
};

// The gradient of the classes of a position.
template <typename S, typename T>
struct DistillationGradient {
  using Arguments = DistillationArguments<S, T>;
  using Element = S;
  static constexpr int kRowLoads = 2, kClassLoads = kDistillationClasses<compute_t<S>>;
  using C = compute_t<S>;

  DistillationSlopes<S> slopes;
  const C* weight;  // of the classes that are smoothed over, or null
  int64_t classes;

  __device__ DistillationGradient(const Arguments& a, int64_t position, const Position<C>& target,
                                  const DistillationSums<S>& sums)
      : slopes(target, sums, a.factors(), a.factor(position)),
        weight(a.labels.smooths() ? a.weight : nullptr),
        classes(a.classes) {}

  // From the statistics.
  __device__ DistillationGradient(const Arguments& a, int64_t position, const S* x, int64_t stride)
      : DistillationGradient(a, position, read_labels(a, position, x, stride),
                             read_stats(a, position)) {}

  // Of classes c, c + 1, ... side by side, which a position need not all have.
  template <int kCount>
  __device__ Vector<S, kCount> of_row(int64_t c, const DistillationPair<S, T, kCount>& pair) const {
    Vector<C, kCount> w{};
    if (weight) w = load_classes<kCount>(weight, c, classes, C(0));
    return of(c, DistillationLogits(pair), [&](int j) { return weight ? w.v[j] : C(1); });
  }

  // Of classes that it has.
  template <int kCount>
  __device__ Vector<S, kCount> of_whole(int64_t c,
                                        const DistillationLogits<S, T, kCount>& logits) const {
    return of(c, logits, [&](int j) { return weight ? weight[c + j] : C(1); });
  }
  __device__ S of_class(int64_t c, int64_t, const DistillationPair<S, T, 1>& pair) const {
    return of_whole(c, DistillationLogits(pair)).v[0];
  }
  template <int kCount>
  __device__ void write_row(S* y, int64_t c, const DistillationPair<S, T, kCount>& pair) const {
    store_anywhere(y + c, of_whole(c, DistillationLogits(pair)));
  }
  template <int kCount>
  __device__ void write_planes(S* y, int64_t c, int64_t stride,
                               const DistillationPair<S, T, 1> (&pairs)[kCount]) const {
    const auto slopes = of_whole(c, DistillationLogits<S, T, kCount>(pairs));
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) y[(c + k) * stride] = slopes.v[k];
  }

 private:
  template <int kCount, typename W>
  __device__ Vector<S, kCount> of(int64_t c, const DistillationLogits<S, T, kCount>& logits,
                                  const W& w) const {
    C slope[kCount];
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) slope[j] = slopes.at(logits.x[j], logits.teacher[j], w(j));
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
