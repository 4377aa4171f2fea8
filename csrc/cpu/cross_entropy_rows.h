// Cross-entropy of positions whose classes lie side by side, a row each.
#pragma once

#include "cross_entropy.h"
#include "narrow.h"
#include "softmax_blocks.h"

RK_NAMESPACE_BEGIN

// T is the type of the logits.
template <typename T>
struct Rows {
  using C = compute_t<T>;
  using L = loop_t<T>;

  const LossTask& task;
  const int64_t classes;
  const C* const weight;
  C* const e;       // the exponentials of a row, relative to the largest logits of its blocks
  C* const maxima;  // of the blocks
  // A block's logits, gradient and probabilities as they are computed with.
  alignas(64) C wide[kBlock];
  alignas(64) C wide_q[kBlock];

  explicit Rows(const LossTask& task)
      : task(task),
        classes(task.classes),
        weight(static_cast<const C*>(task.weight)),
        e(new C[classes + most_blocks(classes)]),
        maxima(e + classes) {}
  Rows(const Rows&) = delete;
  ~Rows() { delete[] e; }

  const T* row(int64_t position) const {
    return static_cast<const T*>(task.x) + position * classes;
  }
  const C* probabilities(int64_t position, int64_t first, int64_t n) {
    const int64_t at = position * classes + first;
    return read_as(task.probabilities, task.probabilities_dtype, at, n, wide_q);
  }
  C& stat(int64_t which, int64_t position) const {
    return static_cast<C*>(task.stats)[which * task.positions + position];
  }

  template <bool kBackward>
  void run(int64_t unit) {
    const int64_t first = unit * task.unit;
    const int64_t last = first + task.unit < task.positions ? first + task.unit : task.positions;
    double total = 0;
    for (int64_t position = first; position < last; ++position) {
      if constexpr (kBackward) {
        backward(position);
      } else {
        const double loss =
            task.probabilities ? forward_probabilities(position) : forward_labels(position);
        if (task.losses) static_cast<C*>(task.losses)[position] = static_cast<C>(loss);
        total += loss;
      }
    }
    if constexpr (!kBackward) task.partials[unit] = total;
  }

  double forward_labels(int64_t position) {
    const auto terms =
        LabelTerms<C>::at(task.labels, task.totals, weight, task.weight_sum, position);
    if (terms.is_nothing()) {
      stat(0, position) = 0;
      stat(1, position) = 1;
      zero_row(position);
      return 0;
    }
    const T* x = row(position);
    const bool smooths = terms.smooths();
    const RowSum sum =
        sum_row(position, [&](const L* block, int64_t first, int64_t n, C max) -> Above {
          if (!smooths) return {};
          return Above::of(block, weight ? weight + first : nullptr, n, max);
        });
    if (task.gradient) write_row(position, sum.softmax, terms, C(1));
    const C x_a = terms.a >= 0 ? load(x[terms.a]) : C(0);
    const C x_b = terms.b >= 0 ? load(x[terms.b]) : C(0);
    return terms.loss(sum.softmax, x_a, x_b, sum.above.sum, task.weight_sum);
  }

  double forward_probabilities(int64_t position) {
    const RowSum sum = sum_row(position, [&](const L* block, int64_t first, int64_t n, C max) {
      return sum_targets(probabilities(position, first, n), first, n,
                         [=](int64_t i) RK_INLINE { return load(block[i]) - max; });
    });
    const double mass = sum.above.mass;
    if (task.gradient) write_probabilities(position, sum.softmax, mass, C(1));
    return task.share * (mass * logarithm(sum.softmax.sum) - sum.above.sum);
  }

  void backward(int64_t position) {
    const C grad = static_cast<const C*>(task.grad_output)[position * task.grad_stride];
    const SoftmaxSum<C> softmax{stat(0, position), stat(1, position)};
    if (task.probabilities) {
      raise_row(position, softmax.max);
      double mass = 0;
      for_blocks(past_line<T>(position * classes), classes, [&](int64_t first, int64_t n) {
        mass += sum_targets(probabilities(position, first, n), first, n);
      });
      return write_probabilities(position, softmax, mass, grad);
    }
    const auto terms =
        LabelTerms<C>::at(task.labels, task.totals, weight, task.weight_sum, position);
    if (terms.is_nothing()) return zero_row(position);
    raise_row(position, softmax.max);
    write_row(position, softmax, terms, grad);
  }

 private:
  struct RowSum {
    SoftmaxSum<C> softmax;
    Above above;
  };

  // A block's targets by themselves, and times `value(i)` as well.
  double sum_targets(const C* q, int64_t first, int64_t n) const {
    const SmoothedTarget<C> target(task);
    if (!weight) return sum_of<C>(n, [=](int64_t i) RK_INLINE { return target(q[i]); });
    const C* w = weight + first;
    return sum_of<C>(n, [=](int64_t i) RK_INLINE { return w[i] * target(q[i]); });
  }
  template <typename F>
  Above sum_targets(const C* q, int64_t first, int64_t n, const F& value) const {
    const SmoothedTarget<C> target(task);
    const double mass = sum_targets(q, first, n);
    if (!weight) {
      return {sum_of<C>(n, [=](int64_t i) RK_INLINE { return target(q[i]) * value(i); }), mass};
    }
    const C* w = weight + first;
    return {sum_of<C>(n, [=](int64_t i) RK_INLINE { return w[i] * target(q[i]) * value(i); }),
            mass};
  }

  // The softmax's sum of a row, whose exponentials stay behind; `above(x, first, n, max)` is what
  // a block has relative to its own largest logit.
  template <typename F>
  RowSum sum_row(int64_t position, const F& above) {
    const T* from = row(position);
    C max = kLowest<C>;
    double sum = 0;
    Above total;
    int64_t block = 0;
    for_blocks(past_line<T>(position * classes), classes, [&](int64_t first, int64_t n) {
      prefetch(from + first + kAhead / static_cast<int64_t>(sizeof(T)), n);
      const L* x = for_loops(from + first, n, wide);
      const C own = largest<C>(x, n);
      if (block == 0) max = own;
      const C larger = own > max ? own : max;
      exponentials(x, n, own, C(1), e + first);
      sum = sum * factor_between(max, larger) +
            sum_of_values(e + first, n) * factor_between(own, larger);
      total.add(above(x, first, n, own), max, own, larger);
      maxima[block++] = own;
      max = larger;
    });
    stat(0, position) = max;
    stat(1, position) = static_cast<C>(sum);
    return {{max, static_cast<C>(sum)}, total};
  }

  // The exponentials of a row whose largest logit is known.
  void raise_row(int64_t position, C max) {
    const T* x = row(position);
    int64_t block = 0;
    for_blocks(past_line<T>(position * classes), classes, [&](int64_t first, int64_t n) {
      prefetch(x + first + kAhead / static_cast<int64_t>(sizeof(T)), n);
      exponentials(for_loops(x + first, n, wide), n, max, C(1), e + first);
      maxima[block++] = max;
    });
  }

  // Calls f(first, n, scale, y) for the blocks of a row's gradient, `scale` times a block's
  // exponentials being the softmax; asks for the row that comes next meanwhile.
  template <typename F>
  void for_written_blocks(int64_t position, const SoftmaxSum<C>& softmax, const F& f) {
    T* y = static_cast<T*>(task.gradient) + position * classes;
    const T* next = row(position + 1 < task.positions ? position + 1 : position);
    int64_t block = 0;
    for_blocks(past_line<T>(position * classes), classes, [&](int64_t first, int64_t n) {
      prefetch_row(next + first, n);
      f(first, n, softmax_factor(maxima[block++], softmax), y + first);
    });
  }

  // y[i] = f(i), rounded.
  template <typename F>
  void write_block(T* y, int64_t n, const F& f) {
    write_rounded(y, n, task.stream, wide, f);
  }

  void write_row(int64_t position, const SoftmaxSum<C>& softmax, const LabelTerms<C>& terms,
                 C grad) {
    const C smooth = terms.smooth * grad;
    for_written_blocks(position, softmax, [&](int64_t first, int64_t n, double scale, T* y) {
      const C k = static_cast<C>(scale * terms.mass * grad);
      const C* values = e + first;
      if (weight && smooth != 0) {
        const C* w = weight + first;
        write_block(y, n, [=](int64_t i) RK_INLINE { return values[i] * k - smooth * w[i]; });
      } else {
        write_block(y, n, [=](int64_t i) RK_INLINE { return values[i] * k - smooth; });
      }
    });
    T* y = static_cast<T*>(task.gradient) + position * classes;
    for (int which = 0; which < 2; ++which) {
      const int64_t label = which ? terms.b : terms.a;
      if (label < 0) continue;
      const C own = maxima[block_of(past_line<T>(position * classes), label)];
      const C p = e[label] * factor_between(own, softmax.max) / softmax.sum;
      const C slope = terms.slope_of_label(label, p, weight ? weight[label] : C(1));
      y[label] = store<T>(slope * grad);
    }
  }

  void write_probabilities(int64_t position, const SoftmaxSum<C>& softmax, double mass, C grad) {
    const SmoothedTarget<C> target(task);
    const C share = static_cast<C>(task.share * grad);
    for_written_blocks(position, softmax, [&](int64_t first, int64_t n, double scale, T* y) {
      const C k = static_cast<C>(scale * mass);
      const C* values = e + first;
      const C* q = probabilities(position, first, n);
      if (!weight) {
        write_block(y, n,
                    [=](int64_t i) RK_INLINE { return share * (values[i] * k - target(q[i])); });
      } else {
        const C* w = weight + first;
        write_block(y, n, [=](int64_t i) RK_INLINE {
          return share * (values[i] * k - w[i] * target(q[i]));
        });
      }
    });
  }

  void zero_row(int64_t position) {
    if (!task.gradient) return;
    T* y = static_cast<T*>(task.gradient) + position * classes;
    write_each(y, classes, task.stream, [](int64_t) RK_INLINE { return store<T>(C(0)); });
  }
};

RK_NAMESPACE_END
