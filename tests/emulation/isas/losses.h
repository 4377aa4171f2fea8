// What the programs of cross-entropy and distillation share: losses of logits, as
// csrc/cpu/loss_task.h makes them.
#pragma once

#include "cpu/cross_entropy.h"
#include "isas.h"

namespace isas {

enum class Target { labels, smoothed, pairs, probabilities };
constexpr const char* kTargets[] = {"labels", "smoothed", "pairs", "probabilities"};

// A loss whose every part is here; `task` points into it.
template <typename T>
struct Loss {
  using C = compute_t<T>;

  LossTask task{};
  Buffer<T> x, gradient;
  Buffer<C> weight, probabilities, stats, losses, grads;
  std::unique_ptr<int64_t[]> labels, partners;
  std::unique_ptr<double[]> partials;
  std::string name;

  Loss(int64_t samples, int64_t classes, int64_t length, bool classes_last, int64_t short_rows,
       Target target, bool weighted, bool stream, int64_t stats_of_each)
      : x(numbers<T>(samples * classes * length)),
        gradient(x.size(), 0),
        weight(classes, 0),
        probabilities(numbers<C>(x.size(), 1.0)),
        stats(stats_of_each * samples * length, 0),
        losses(samples * length, 0),
        grads(numbers<C>(samples * length)),
        labels(new int64_t[samples * length]),
        partners(new int64_t[samples * length]) {
    constexpr int64_t kIgnored = -100;
    const int64_t positions = samples * length;
    for (int64_t i = 0; i < positions; ++i) {
      labels[i] = below(8) ? below(classes) : kIgnored;
      partners[i] = below(8) ? below(classes) : kIgnored;
    }
    // Classes that are left out, where that leaves a loss, and a position of which one is certain.
    const bool of_some = target == Target::labels || target == Target::pairs;
    for (int64_t i = 0; of_some && i < x.size(); i += 61) x.data()[i] = store<T>(C(-INFINITY));
    for (int64_t c = 0; c < classes; ++c) weight.data()[c] = C(below(100)) / 64;
    for (int64_t c = 0; c < classes; ++c) {
      x.data()[classes_last ? c : c * length] = store<T>(C(c == 1 ? 3000.0 : -3000.0));
    }
    task.dtype = kDType<T>;
    task.x = x.data();
    task.classes = classes;
    task.length = length;
    task.classes_last = classes_last;
    task.in_rows = classes_last && classes >= short_rows;
    task.positions = positions;
    task.unit = task.in_rows ? 7 : 32;
    task.units =
        classes_last ? ceil_div(positions, task.unit) : samples * ceil_div(length, task.unit);
    partials.reset(new double[task.units]());
    task.labels = {labels.get(), nullptr, {}, true, 0.3, length, classes, kIgnored, 0.0, nullptr};
    if (target == Target::smoothed) task.labels.smoothing = 0.1;
    if (target == Target::pairs) task.labels.partner_labels = partners.get();
    task.totals = {40.0, 35.0};
    task.share = 1.0 / static_cast<double>(positions);
    if (target == Target::probabilities) {
      task.labels.labels = nullptr;
      task.probabilities = probabilities.data();
      task.probabilities_dtype = kDType<C>;
      task.totals = {1.0, 1.0};
    }
    task.weight = weighted ? weight.data() : nullptr;
    task.weight_sum = static_cast<double>(classes);
    task.stats = stats.data();
    task.losses = losses.data();
    task.partials = partials.get();
    task.gradient = gradient.data();
    task.stream = stream;
    task.grad_output = grads.data();
    task.grad_stride = 1;
    name = std::string(kName<T>) + ", (" + std::to_string(samples) + ", " +
           std::to_string(classes) + ", " + std::to_string(length) + ")" +
           (classes_last ? " classes last, " : ", ") + kTargets[static_cast<int>(target)] +
           (weighted ? ", weighted" : "") + (stream ? ", streamed" : "");
  }

  // Calls the two leaves as forward(begin, end) and backward(begin, end), of units.
  template <typename Forward, typename Backward>
  void call(const char* op, const Forward& forward, const Backward& backward) {
    share_out(0, task.units, 1, forward);
    Digest of_forward;
    for (int64_t i = 0; i < stats.size(); ++i) {
      const C of_any_zero =
          stats.data()[i] + C(0);  // of zeros of both signs, either is the largest
      of_forward.add(&of_any_zero, 1);
    }
    of_forward.add(losses);
    of_forward.add(partials.get(), task.units);
    of_forward.add(gradient);
    of_forward.report("%s_units, %s", op, name.c_str());
    share_out(0, task.units, 1, backward);
    Digest of_backward;
    of_backward.add(gradient);
    of_backward.report("%s_backward_units, %s", op, name.c_str());
  }
};

// Calls f(samples, classes, length, classes_last, target, weighted, stream).
template <typename F>
void for_losses(const F& f) {
  for (const Target target :
       {Target::labels, Target::smoothed, Target::pairs, Target::probabilities}) {
    for (const bool weighted : {false, true}) {
      f(45, 10, 1, true, target, weighted, false);
      f(9, 77, 1, true, target, weighted, weighted);
      f(2, 1100, 1, true, target, weighted, !weighted);
      f(2, 6, 70, false, target, weighted, weighted);
    }
  }
}

}  // namespace isas
