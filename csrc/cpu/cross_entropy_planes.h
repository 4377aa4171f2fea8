// Cross-entropy of positions that lie side by side, the classes of each a plane apart: a strip of
// positions at a time, plane by plane. Rows of few classes, of which a vector would be filled in
// part only, are turned to such planes and their gradient back.
#pragma once

#include "cross_entropy.h"
#include "narrow.h"
#include "softmax_blocks.h"

RK_NAMESPACE_BEGIN

constexpr int64_t kLongestStrip = 256;  // positions

// T is the type of the logits.
template <typename T>
struct Planes {
  using C = compute_t<T>;
  using L = loop_t<T>;

  const LossTask& task;
  const int64_t strip;
  const C* const weight;
  C* const e;  // the exponentials of a strip, plane by plane
  // Of the strip in work: its logits and gradient in the first plane, the place of its first
  // probability, and how many elements planes are apart. Those of rows are turned to planes here,
  // probabilities as what they are computed with.
  const T* x = nullptr;
  T* y = nullptr;
  int64_t q_first = 0;
  int64_t apart;
  T* const turned;
  C* const turned_q;
  // A plane's logits or gradient, and its probabilities, as they are computed with.
  alignas(64) C wide[kLongestStrip];
  alignas(64) C wide_q[kLongestStrip];
  // Of each position of a strip:
  C max[kLongestStrip], sum[kLongestStrip];
  C above[kLongestStrip], mass[kLongestStrip];    // sums of w_c (x_c - max) and of w_c
  C factor[kLongestStrip], lower[kLongestStrip];  // the gradient is e factor - lower w_c
  C losses[kLongestStrip];
  LabelTerms<C> terms[kLongestStrip];

  explicit Planes(const LossTask& task)
      : task(task),
        strip(task.unit),
        weight(static_cast<const C*>(task.weight)),
        e(new C[task.classes * task.unit]),
        apart(task.classes_last ? task.unit : task.length),
        turned(task.classes_last ? new T[2 * task.classes * task.unit] : nullptr),
        turned_q(task.classes_last && task.probabilities ? new C[task.classes * task.unit]
                                                         : nullptr) {}
  Planes(const Planes&) = delete;
  ~Planes() {
    delete[] e;
    delete[] turned;
    delete[] turned_q;
  }

  // A unit is a strip of a sample, or of all rows: the last one of each may be short.
  template <bool kBackward>
  void run(int64_t unit) {
    const int64_t length = task.classes_last ? task.positions : task.length;
    const int64_t strips = ceil_div(length, strip);
    const int64_t sample = unit / strips, first = unit % strips * strip;
    const int64_t count = length - first < strip ? length - first : strip;
    const int64_t position = sample * length + first;
    begin(sample * task.classes * length + (task.classes_last ? first * task.classes : first),
          count);
    if (!task.probabilities) {
      for (int64_t j = 0; j < count; ++j) {
        terms[j] =
            LabelTerms<C>::at(task.labels, task.totals, weight, task.weight_sum, position + j);
      }
    }
    C* maxima = static_cast<C*>(task.stats) + position;
    C* sums = maxima + task.positions;
    if constexpr (kBackward) {
      memcpy(max, maxima, count * sizeof(C));
    } else {
      find_largest(count);
      memcpy(maxima, max, count * sizeof(C));
    }
    raise(count);
    if constexpr (kBackward) {
      memcpy(sum, sums, count * sizeof(C));
    } else {
      memcpy(sums, sum, count * sizeof(C));
    }
    if (task.probabilities) sum_targets(count);
    if constexpr (!kBackward) {
      if (!task.probabilities && task.labels.smooths()) sum_above(count);
      task.partials[unit] = lose(count);
      if (task.losses) memcpy(static_cast<C*>(task.losses) + position, losses, count * sizeof(C));
    }
    if (!task.gradient) return;
    C grad[kLongestStrip];
    for (int64_t j = 0; j < count; ++j) {
      grad[j] = kBackward
                    ? static_cast<const C*>(task.grad_output)[(position + j) * task.grad_stride]
                    : C(1);
    }
    T* const rows = y;
    y = place_gradient();
    task.probabilities ? write_probabilities(count, grad) : write_labels(count, grad);
    end(rows, count);
  }

 private:
  const L* plane(int64_t c, int64_t count) { return for_loops(x + c * apart, count, wide); }
  const C* probabilities(int64_t c, int64_t count) {
    if (task.classes_last) return turned_q + c * strip;
    const int64_t first = q_first + c * apart;
    return read_as(task.probabilities, task.probabilities_dtype, first, count, wide_q);
  }
  T* gradient(int64_t c) const { return y + c * apart; }
  T logit(int64_t c, int64_t j) const { return x[c * apart + j]; }

  // y[j] = f(j), rounded, in the plane of class c.
  template <typename F>
  void write_plane(int64_t c, int64_t count, const F& f) {
    write_rounded(gradient(c), count, streams(), wide, f);
  }

  // The strip whose first logit is element `at` of the tensor.
  void begin(int64_t at, int64_t count) {
    const int64_t classes = task.classes;
    x = static_cast<const T*>(task.x) + at;
    y = task.gradient ? static_cast<T*>(task.gradient) + at : nullptr;
    q_first = at;
    if (!task.classes_last) return;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t c = 0; c < classes; ++c) turned[c * strip + j] = x[j * classes + c];
    }
    x = turned;
    if (!task.probabilities) return;
    for (int64_t j = 0; j < count; ++j) {
      const C* from =
          read_as(task.probabilities, task.probabilities_dtype, at + j * classes, classes, wide_q);
      for (int64_t c = 0; c < classes; ++c) turned_q[c * strip + j] = from[c];
    }
  }

  // Where the gradient of a strip is made, and what brings it to where it belongs.
  T* place_gradient() { return task.classes_last ? turned + task.classes * strip : y; }
  void end(T* rows, int64_t count) const {
    if (!task.classes_last) return;
    const int64_t classes = task.classes;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t c = 0; c < classes; ++c) rows[j * classes + c] = y[c * strip + j];
    }
  }

  bool streams() const { return task.stream && !task.classes_last; }
  C weight_of(int64_t c) const { return weight ? weight[c] : C(1); }

  void find_largest(int64_t count) {
    for (int64_t j = 0; j < count; ++j) max[j] = kLowest<C>;
    for (int64_t c = 0; c < task.classes; ++c) {
      // For the strip that comes next.
      if (!task.classes_last) prefetch(this->x + c * apart + strip, count);
      const L* x = plane(c, count);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        const C value = load(x[j]);
        max[j] = value > max[j] ? value : max[j];
      }
    }
  }

  // totals[j] = the sum over classes of what add(c, sums) adds to sums[j], group by group: a sum
  // of thousands of numbers one by one would lose digits.
  template <typename F>
  void sum_planes(int64_t count, C* totals, const F& add) const {
    constexpr int64_t kGroup = 32;  // planes
    for (int64_t j = 0; j < count; ++j) totals[j] = 0;
    for (int64_t first = 0; first < task.classes; first += kGroup) {
      const int64_t last = first + kGroup < task.classes ? first + kGroup : task.classes;
      C sums[kLongestStrip] = {};
      for (int64_t c = first; c < last; ++c) add(c, sums);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) totals[j] += sums[j];
    }
  }

  void raise(int64_t count) {
    sum_planes(count, sum, [&](int64_t c, C* sums) RK_INLINE {
      const L* x = plane(c, count);
      C* to = e + c * strip;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        to[j] = exponential_below(load(x[j]) - max[j]);
        sums[j] += to[j];
      }
    });
  }

  void sum_above(int64_t count) {
    sum_planes(count, above, [&](int64_t c, C* sums) RK_INLINE {
      const L* x = plane(c, count);
      const C w = weight_of(c);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sums[j] += w * (load(x[j]) - max[j]);
    });
  }

  void sum_targets(int64_t count) {
    const SmoothedTarget<C> target(task);
    sum_planes(count, mass, [&](int64_t c, C* sums) RK_INLINE {
      const C* q = probabilities(c, count);
      const C w = weight_of(c);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sums[j] += w * target(q[j]);
    });
    sum_planes(count, above, [&](int64_t c, C* sums) RK_INLINE {
      const L* x = plane(c, count);
      const C* q = probabilities(c, count);
      const C w = weight_of(c);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        sums[j] += w * target(q[j]) * (load(x[j]) - max[j]);
      }
    });
  }

  double lose(int64_t count) {
    double total = 0;
    for (int64_t j = 0; j < count; ++j) {
      double loss;
      if (task.probabilities) {
        loss = task.share * (static_cast<double>(mass[j]) * logarithm(sum[j]) - above[j]);
      } else {
        const LabelTerms<C>& t = terms[j];
        const C x_a = t.a >= 0 ? load(logit(t.a, j)) : C(0);
        const C x_b = t.b >= 0 ? load(logit(t.b, j)) : C(0);
        loss = t.loss({max[j], sum[j]}, x_a, x_b, above[j], task.weight_sum);
      }
      losses[j] = static_cast<C>(loss);
      total += loss;
    }
    return total;
  }

  void write_labels(int64_t count, const C* grad) {
    for (int64_t j = 0; j < count; ++j) {
      factor[j] = terms[j].mass * grad[j] / sum[j];
      lower[j] = terms[j].smooth * grad[j];
    }
    for (int64_t c = 0; c < task.classes; ++c) {
      const C* values = e + c * strip;
      const C w = weight_of(c);
      const C *k = factor, *u = lower;
      write_plane(c, count, [=](int64_t j) RK_INLINE { return values[j] * k[j] - w * u[j]; });
    }
    for (int64_t j = 0; j < count; ++j) {
      // An ignored position has no gradient, also where that made a NaN of nothing: of logits or of
      // a grad_output that are not finite.
      if (terms[j].is_nothing() && factor[j] != 0) {
        for (int64_t c = 0; c < task.classes; ++c) gradient(c)[j] = store<T>(C(0));
      }
      for (int which = 0; which < 2; ++which) {
        const int64_t label = which ? terms[j].b : terms[j].a;
        if (label < 0) continue;
        const C p = e[label * strip + j] / sum[j];
        const C slope = terms[j].slope_of_label(label, p, weight_of(label));
        gradient(label)[j] = store<T>(slope * grad[j]);
      }
    }
  }

  void write_probabilities(int64_t count, const C* grad) {
    const SmoothedTarget<C> target(task);
    for (int64_t j = 0; j < count; ++j) {
      lower[j] = static_cast<C>(task.share * grad[j]);
      factor[j] = mass[j] / sum[j];
    }
    for (int64_t c = 0; c < task.classes; ++c) {
      const C* values = e + c * strip;
      const C* q = probabilities(c, count);
      const C w = weight_of(c);
      const C *k = factor, *u = lower;
      write_plane(c, count, [=](int64_t j) RK_INLINE {
        return u[j] * (values[j] * k[j] - w * target(q[j]));
      });
    }
  }
};

RK_NAMESPACE_END
