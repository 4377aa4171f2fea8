// Cross-entropy's arguments, and what its kernels make of one position.
#pragma once

#include "reg_kernels/loss_backward.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kLongLoads = 4;   // vectors of a thread before its first use of one
constexpr int kPlaneLoads = 8;  // classes before the first use of one, where they lie apart

// `stats` has 2 of a position: the largest logit, the sum of exp(logit - largest).
template <typename T>
struct CrossEntropy : LossArguments<T> {
  using C = compute_t<T>;
  static constexpr int kCount = kVector<T>;
  template <int kWidth>
  using Logits = Vector<T, kWidth>;

  // In x's storage order, where there are no labels.
  const T* probabilities;    // or null
  const C* probabilities_c;  // the same in the type that is computed in, or null

  RK_HD bool has_probabilities() const { return this->labels.labels == nullptr; }
  // Whether each class counts for something of its own, beside those of the labels.
  RK_HD bool is_dense() const { return has_probabilities() || this->labels.smooths(); }

  int64_t most_vectors() const { return most_row_vectors(this->x, this->classes); }
  __device__ Logits<kCount> load_row(int64_t first, int64_t c, int64_t classes) const {
    return load_logits<kCount>(this->x + first, c, classes);
  }
  __device__ Logits<1> load_class(int64_t element) const { return {{this->x[element]}}; }
};

// What a position's classes have come to: the softmax's sum, and for dense targets, of q_c each,
// dense = sum of q_c (x_c - max) and mass = sum of q_c. All terms of `dense` have one sign, so that
// it may move from one maximum to the next.
template <typename T, bool kDense>
struct ClassSums {
  using C = compute_t<T>;

  static constexpr C dense = 0, mass = 0;
  SoftmaxSum<C> softmax;

  __device__ void raise_to(C max) {
    softmax.sum *= softmax_exponential<T>(softmax.max - max);
    softmax.max = max;
  }
  __device__ void merge(const ClassSums& other) { softmax.merge(other.softmax); }
  __device__ void add_dense(C, C) {}
};

template <typename T>
struct ClassSums<T, true> {
  using C = compute_t<T>;

  SoftmaxSum<C> softmax;
  C dense = 0, mass = 0;

  // Without a mass there is nothing to move, and the first maximum is as far as it gets.
  __device__ C moved_to(C max) const {
    return mass != C(0) ? dense - (max - softmax.max) * mass : dense;
  }
  __device__ void raise_to(C max) {
    dense = moved_to(max);
    softmax.sum *= softmax_exponential<T>(softmax.max - max);
    softmax.max = max;
  }
  __device__ void merge(const ClassSums& other) {
    const C max = larger(softmax.max, other.softmax.max);
    dense = moved_to(max) + other.moved_to(max);
    mass += other.mass;
    softmax.merge(other.softmax);
  }
  __device__ void add_dense(C q, C above_max) {
    dense += q * above_max;
    mass += q;
  }
};

// Values q_c = w_c (keep t_c + base) that the classes of dense targets count for, but for a factor
// of the position: of probabilities t, and of the smoothing of labels, where it is w_c.
template <typename T>
struct DenseTarget {
  using C = compute_t<T>;

  const T* probabilities;    // from here on those of one position, class by class
  const C* probabilities_c;  //
  const C* weight;
  C keep, base;

  // Of labels.
  explicit __device__ DenseTarget(const C* weight)
      : probabilities(nullptr), probabilities_c(nullptr), weight(weight), keep(0), base(1) {}

  // `first` is the element of the position's class 0.
  __device__ DenseTarget(const CrossEntropy<T>& a, int64_t first)
      : probabilities(a.probabilities ? a.probabilities + first : nullptr),
        probabilities_c(a.probabilities_c ? a.probabilities_c + first : nullptr),
        weight(a.weight),
        keep(static_cast<C>(1.0 - a.labels.smoothed_by())),
        base(a.has_probabilities()
                 ? static_cast<C>(a.labels.smoothed_by() / static_cast<double>(a.classes))
                 : C(1)) {}

  // Of class c, element c * stride of the position.
  __device__ C at(int64_t c, int64_t stride) const {
    C q = base;
    if (probabilities) q += keep * load(probabilities[c * stride]);
    if (probabilities_c) q += keep * probabilities_c[c * stride];
    return weight ? q * weight[c] : q;
  }

  // Of classes side by side from c on; 0 outside of the row.
  template <int kCount>
  __device__ void read(int64_t c, int64_t classes, C (&q)[kCount]) const {
    RK_UNROLL
    for (int i = 0; i < kCount; ++i) q[i] = c + i >= 0 && c + i < classes ? base : C(0);
    if (probabilities) {
      const auto t = load_classes<kCount>(probabilities, c, classes, T{});
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) q[i] += keep * load(t.v[i]);
    }
    if (probabilities_c) {
      const auto t = load_classes<kCount>(probabilities_c, c, classes, C(0));
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) q[i] += keep * t.v[i];
    }
    if (weight) {
      const auto w = load_classes<kCount>(weight, c, classes, C(0));
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) q[i] *= w.v[i];
    }
  }
};

// Of probabilities there is no label, and `smooth` is the factor of q_c. Without dense targets
// nothing is smoothed.
template <bool kDense, typename T>
__device__ __forceinline__ Position<compute_t<T>> read_position(const CrossEntropy<T>& a,
                                                                int64_t position, const T* x,
                                                                int64_t stride) {
  using C = compute_t<T>;
  if (!a.has_probabilities()) return read_labels<kDense>(a, position, x, stride);
  return {
      {-1, -1, 0, 0, static_cast<C>(1.0 / static_cast<double>(a.mean_of())), 0, false}, 0, 0, true};
}

// The loss of a position, and its statistics in their place.
template <bool kDense, typename T>
__device__ __forceinline__ double finish_position(const CrossEntropy<T>& a, int64_t position,
                                                  const Position<compute_t<T>>& target,
                                                  const ClassSums<T, kDense>& sums) {
  using C = compute_t<T>;
  const SoftmaxSum<C>& softmax = sums.softmax;
  if (a.stats) {
    a.stats[position] = softmax.max;
    a.stats[a.positions + position] = softmax.sum;
  }
  double loss;
  if (a.has_probabilities()) {
    const double log_sum = logarithm(softmax.sum);
    loss = static_cast<double>(target.terms.smooth) * (sums.mass * log_sum - sums.dense);
  } else {
    loss = target.terms.loss(softmax, target.x_a, target.x_b, sums.dense, a.target_sums().weights);
  }
  if (a.losses) a.losses[position] = static_cast<C>(loss);
  return loss;
}

// The gradient times `factor`: that by the loss is scale exp(x_c - max) - smooth q_c, less what the
// labels' own classes have.
template <typename C>
struct Slope {
  C max, scale, smooth, ka, kb, factor;
  int64_t a, b;
  bool counts;

  // `mass` of probabilities.
  __device__ Slope(const Position<C>& target, const SoftmaxSum<C>& softmax, bool probabilities,
                   C mass, C factor)
      : max(softmax.max),
        scale((probabilities ? target.terms.smooth * mass : target.terms.mass) / softmax.sum),
        smooth(target.terms.smooth),
        ka(target.terms.ka),
        kb(target.terms.kb),
        factor(factor),
        a(target.terms.a),
        b(target.terms.b),
        counts(target.counts) {}

  // In the order of LabelTerms::slope_of_label.
  __device__ C own(int64_t c) const { return (c == a ? ka : C(0)) + (c == b ? kb : C(0)); }
};

// Turns exponentials of classes c, c + 1, ... into the gradient; `q` counts where kDense.
template <bool kDense, typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> slopes(const Slope<compute_t<T>>& slope, int64_t c,
                                                    const compute_t<T> (&e)[kCount],
                                                    const compute_t<T> (&q)[kCount]) {
  using C = compute_t<T>;
  Vector<T, kCount> result{};
  if (!slope.counts) return result;
  const auto set = [&](int i, C own) {
    if constexpr (kDense) own += slope.smooth * q[i];
    result.v[i] = store<T>((e[i] * slope.scale - own) * slope.factor);
  };
  // Two comparisons a vector; one of its own for each element would be a third of the work.
  const auto has = [&](int64_t label) { return label >= c && label < c + kCount; };
  if (has(slope.a) || has(slope.b)) {
    RK_UNROLL
    for (int i = 0; i < kCount; ++i) set(i, slope.own(c + i));
  } else {
    RK_UNROLL
    for (int i = 0; i < kCount; ++i) set(i, C(0));
  }
  return result;
}

// The gradient of the classes of a position.
template <bool kDense, typename T>
struct CrossEntropyGradient {
  using Arguments = CrossEntropy<T>;
  using Element = T;
  static constexpr int kRowLoads = kLongLoads, kClassLoads = kPlaneLoads;
  using C = compute_t<T>;

  Slope<C> slope;
  DenseTarget<T> classwise;
  int64_t classes;

  // Of labels, from the statistics.
  __device__ CrossEntropyGradient(const Arguments& a, int64_t position, const T* x, int64_t stride)
      : slope(read_position<kDense>(a, position, x, stride),
              {a.stats[position], a.stats[a.positions + position]}, false, C(0),
              a.factor(position)),
        classwise(a.weight),
        classes(a.classes) {}

  __device__ CrossEntropyGradient(const Slope<C>& slope, const DenseTarget<T>& classwise,
                                  int64_t classes)
      : slope(slope), classwise(classwise), classes(classes) {}

  // Of classes c, c + 1, ... side by side.
  template <int kCount>
  __device__ Vector<T, kCount> of_row(int64_t c, const Vector<T, kCount>& x) const {
    C e[kCount], q[kCount];
    if constexpr (kDense) classwise.read(c, classes, q);
    RK_UNROLL
    for (int i = 0; i < kCount; ++i) e[i] = softmax_exponential<T>(load(x.v[i]) - slope.max);
    return slopes<kDense, T>(slope, c, e, q);
  }

  // Of class c, element c * stride of the position.
  __device__ T of_class(int64_t c, int64_t stride, const Vector<T, 1>& x) const {
    C e[1] = {softmax_exponential<T>(load(x.v[0]) - slope.max)}, q[1] = {};
    if constexpr (kDense) q[0] = classwise.at(c, stride);
    return slopes<kDense, T>(slope, c, e, q).v[0];
  }

  template <int kCount>
  __device__ void write_row(T* y, int64_t c, const Vector<T, kCount>& x) const {
    store_classes(y, c, classes, of_row(c, x));
  }
  template <int kCount>
  __device__ void write_planes(T* y, int64_t c, int64_t stride,
                               const Vector<T, 1> (&x)[kCount]) const {
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      if (c + k >= classes) continue;
      y[(c + k) * stride] = of_class(c + k, stride, x[k]);
    }
  }
};

}  // namespace cuda
RK_NAMESPACE_END
