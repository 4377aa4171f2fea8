// What cross-entropy and distillation do before and after their loops on the CPU.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>

#include "../torch/cross_entropy.h"
#include "cache.h"
#include "cross_entropy.h"

namespace reg_kernels {

// What the labels' weights sum up to, in the order of positions; refuses a label or a share that
// is out of range.
inline LabelTotals label_totals(const LossInput& in, const char* op) {
  const auto weight_of = [&](int64_t label) {
    if (!in.weight) return 1.0;
    return in.dtype == DType::float64 ? static_cast<const double*>(in.weight)[label]
                                      : static_cast<const float*>(in.weight)[label];
  };
  const auto total = [&](const int64_t* labels) {
    double sum = 0;
    for (int64_t i = 0; labels && i < in.positions; ++i) {
      RK_REQUIRE(in.labels.is_valid(labels[i]), op, "labels",
                 words("in [0, ", in.labels.classes, ")"), labels[i]);
      if (!in.labels.is_ignored(labels[i])) sum += weight_of(labels[i]);
    }
    return sum;
  };
  const LabelTotals totals{total(in.labels.labels), total(in.labels.partner_labels)};
  if (in.labels.partner_labels) {
    const int64_t samples = in.positions / in.layout.length;
    for (int64_t n = 0; n < (in.labels.one_lam_for_all ? 1 : samples); ++n) {
      const double lam = in.labels.lam.at(n, in.labels.one_lam);
      RK_REQUIRE(lam >= 0 && lam <= 1, op, "lam", "in [0, 1]", lam);
    }
  }
  if (in.reduction != Reduction::mean || !in.labels.labels) return {1, 1};
  return totals;
}

// `short_rows`: classes from which on a row is worked on as one.
inline LossTask loss_task(const LossInput& in, int64_t short_rows, const char* op) {
  constexpr int64_t kUnit = 16384;  // logits: few enough to share out
  constexpr int64_t kLeastStrip = 16, kMostStrip = 256, kStripLogits = 65536;
  LossTask task{};
  task.dtype = in.dtype;
  task.x = in.x;
  task.classes = in.layout.channels;
  task.length = in.layout.length;
  task.classes_last = in.classes_last;
  task.positions = in.positions;
  task.in_rows = task.classes_last && task.classes >= short_rows;
  task.unit = std::max<int64_t>(1, kUnit / task.classes);
  if (!task.in_rows) {
    // Whole lines of 64 bytes, and a strip's exponentials within the second-level cache.
    task.unit = std::clamp(kStripLogits / task.classes / 32 * 32, kLeastStrip, kMostStrip);
  }
  task.units = task.classes_last ? ceil_div(task.positions, task.unit)
                                 : task.positions / task.length * ceil_div(task.length, task.unit);
  task.labels = in.labels;
  task.probabilities = in.probabilities;
  task.probabilities_dtype = in.probabilities_dtype;
  task.share = in.reduction == Reduction::mean ? 1.0 / static_cast<double>(in.positions) : 1.0;
  task.weight = in.weight;
  task.weight_sum = static_cast<double>(task.classes);
  if (in.weight) {
    task.weight_sum = 0;
    for (int64_t c = 0; c < task.classes; ++c) {
      task.weight_sum += in.dtype == DType::float64 ? static_cast<const double*>(in.weight)[c]
                                                    : static_cast<const float*>(in.weight)[c];
    }
  }
  task.totals = in.probabilities ? LabelTotals{1, 1} : label_totals(in, op);
  return task;
}

// Calls f(begin, end) for ranges of units, by torch's threads.
template <typename F>
void for_units(const LossTask& task, const F& f) {
  constexpr int64_t kGrain = 32768;  // logits a thread takes at the least
  const int64_t grain = std::max<int64_t>(1, kGrain / (task.unit * task.classes));
  torch::stable::parallel_for(0, task.units, grain, f);
}

// What a forward returns: (loss, stats, gradient).
class LossOutputs {
 public:
  LossOutputs(LossTask& task, const LossInput& in, const LossTensors& tensors)
      : tensors_(tensors), partials_(new double[task.units]) {
    task.stats = tensors_.stats.mutable_data_ptr();
    task.losses = in.reduction == Reduction::none ? tensors_.loss.mutable_data_ptr() : nullptr;
    task.partials = partials_.get();
    task.gradient = tensors_.has_gradient ? tensors_.gradient.mutable_data_ptr() : nullptr;
    task.stream = is_streamed(tensors_.gradient);
  }

  static bool is_streamed(const Tensor& x) {
    return x.numel() * static_cast<int64_t>(x.element_size()) > last_level_cache_bytes();
  }

  LossResult finish(const LossTask& task, const LossInput& in) {
    if (in.reduction != Reduction::none) {
      double total = 0;
      for (int64_t i = 0; i < task.units; ++i) total += partials_[i];
      // A mean over nothing: no position has lost anything, yet the loss is not 0.
      const bool of_none =
          task.totals.labels == 0 || (in.labels.partner_labels && task.totals.partner_labels == 0);
      if (of_none) total = std::numeric_limits<double>::quiet_NaN();
      if (in.dtype == DType::float64) {
        *static_cast<double*>(tensors_.loss.mutable_data_ptr()) = total;
      } else {
        *static_cast<float*>(tensors_.loss.mutable_data_ptr()) = static_cast<float>(total);
      }
    }
    return tensors_.result();
  }

 private:
  LossTensors tensors_;
  std::unique_ptr<double[]> partials_;
};

// What a backward reads and writes.
inline void set_backward(LossTask& task, const LossInput& in, const LossSaved& saved,
                         Tensor& gradient) {
  task.stats = const_cast<void*>(saved.stats);
  task.grad_output = saved.grad_output;
  task.grad_stride = in.reduction == Reduction::none ? 1 : 0;
  task.gradient = gradient.mutable_data_ptr();
  task.stream = LossOutputs::is_streamed(gradient);
}

}  // namespace reg_kernels
