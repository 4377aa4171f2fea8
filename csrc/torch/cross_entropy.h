// What the losses of logits are given, as both launchers, CPU and CUDA, read it: what ops/_loss.py
// declares, checked for what memory safety rests on, as raw pointers.
#pragma once

#include <limits>
#include <tuple>

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/cross_entropy_math.h"

namespace reg_kernels {

// Logits (N, C, ...) and their targets. The classes of a position lie side by side where
// `classes_last`, else `layout.length` apart. Positions are counted n S + s, S being
// `layout.length`, in either case.
struct LossInput {
  DType dtype;
  ChannelLayout layout;  // channels are classes
  bool classes_last;
  int64_t numel;
  int64_t positions;  // N S
  const void* x;
  LabelOptions labels;        // where there are no probabilities
  const void* probabilities;  // of the classes, in x's layout; or null
  DType probabilities_dtype;  // x's, or the one that it is computed in
  const void* weight;         // (C,), of the type that x is computed in; or null
  Reduction reduction;
};

// What a compiled program passes instead of `count` numbers, so that they may vary; or null.
inline const double* traced_numbers(const Call& call, const OptionalTensor& numbers, int64_t count,
                                    const char* name) {
  if (!numbers) return nullptr;
  return static_cast<const double*>(call.vector(*numbers, ScalarType::Double, count, name));
}

// What a loss op is told of its target, as ops/_loss.py names it; it holds for the call alone.
struct LossTarget {
  const OptionalTensor &target, &partner, &lam;
  double one_lam;
  const OptionalTensor& weight;
  int64_t ignore_index;
  double label_smoothing;
  int64_t reduction;
  const OptionalTensor& traced_smoothing;
};

// What distillation is told of its teacher.
struct Teacher {
  const Tensor& logits;
  double temperature, alpha;
  const OptionalTensor& traced_softness;
};

inline LossInput loss_input(const Call& call, const Tensor& x, const LossTarget& of) {
  const auto& [target, partner, lam, one_lam, weight, ignore_index, smoothing, reduction,
               traced_smoothing] = of;
  LossInput in{};
  in.dtype = dtype_of(x, call.op);
  in.layout = channel_layout(x, call.op);
  in.classes_last = in.layout.channels_last || in.layout.length == 1;
  in.numel = x.numel();
  in.positions = checked_product(x.size(0), in.layout.length, call.op);
  in.x = call.data(x, "input");
  RK_REQUIRE(reduction >= 0 && reduction <= 2, call.op, "reduction", "0, 1 or 2", reduction);
  in.reduction = static_cast<Reduction>(reduction);
  const ScalarType compute = compute_type_of(in.dtype);
  if (weight) in.weight = call.vector(*weight, compute, in.layout.channels, "weight");
  in.labels.positions = in.layout.length;
  in.labels.classes = in.layout.channels;
  in.labels.ignore_index = ignore_index;
  in.labels.smoothing = smoothing;
  in.labels.traced_smoothing = traced_numbers(call, traced_smoothing, 1, "traced_smoothing");
  in.labels.one_lam_for_all = true;
  in.labels.one_lam = one_lam;
  RK_REQUIRE(partner || !lam, call.op, "lam", "None without a partner", *lam);
  if (!target) {
    RK_REQUIRE(!partner, call.op, "partner", "None without a target", *partner);
    return in;
  }
  if (target->scalar_type() != ScalarType::Long) {
    RK_REQUIRE(has_layout_of(x, *target) &&
                   (target->scalar_type() == x.scalar_type() || target->scalar_type() == compute),
               call.op, "target",
               words("int64 labels, or probabilities like the input, ", described(x)), *target);
    RK_REQUIRE(!partner, call.op, "partner", "None with probabilities", *partner);
    in.probabilities = call.data(*target, "target");
    in.probabilities_dtype = dtype_of(*target, call.op, "target");
    return in;
  }
  const auto labels = [&](const Tensor& tensor, const char* name) {
    return static_cast<const int64_t*>(call.vector(tensor, ScalarType::Long, in.positions, name));
  };
  in.labels.labels = labels(*target, "target");
  if (!partner) return in;
  in.labels.partner_labels = labels(*partner, "partner");
  if (lam) set_shares(call, *lam, x.size(0), in.labels);
  return in;
}

// A teacher, checked.
struct TeacherInput {
  const void* logits;  // of the input's shape and strides
  DType dtype;
  double temperature, alpha;
  const double* traced_softness;  // the two, or null
};

inline TeacherInput teacher_input(const Call& call, const LossInput& in, const Tensor& x,
                                  const Teacher& of) {
  const Tensor& teacher = of.logits;
  RK_REQUIRE(!in.probabilities, call.op, "target", "int64 labels", "probabilities");
  const DType dtype = dtype_of(teacher, call.op, "teacher");
  RK_REQUIRE(has_layout_of(x, teacher) && (dtype == DType::float64) == (in.dtype == DType::float64),
             call.op, "teacher",
             words("of the input's shape and strides, and float64 if that is: ", described(x)),
             teacher);
  return {call.data(teacher, "teacher"), dtype, of.temperature, of.alpha,
          traced_numbers(call, of.traced_softness, 2, "traced_softness")};
}

// What a backward reads: the loss's gradient, of one number or of one a position, and `count` stats
// a position.
struct LossSaved {
  const void *grad_output, *stats;
};

// What a backward is given of its forward, and what comes in.
struct LossBackward {
  const Tensor &grad_output, &input, &stats;
};

inline LossSaved loss_saved(const Call& call, const LossInput& in, const LossBackward& of,
                            int64_t count) {
  const ScalarType compute = compute_type_of(in.dtype);
  const int64_t losses = in.reduction == Reduction::none ? in.positions : 1;
  return {call.vector(of.grad_output, compute, losses, "grad_output"),
          call.vector(of.stats, compute, checked_product(count, in.positions, call.op), "stats")};
}

// An uninitialised contiguous tensor of the type that x is computed in: of no dimensions, or of x's
// positions, (N, ...), with `stats` of them in front where that is not 0.
inline Tensor empty_positions(const Tensor& x, bool of_positions, int64_t stats) {
  std::vector<int64_t> sizes;
  if (stats) sizes.push_back(stats);
  if (of_positions) {
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (d != 1) sizes.push_back(x.size(d));
    }
  }
  const int32_t dtype = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64()
                                                              : aoti_torch_dtype_float32();
  return empty_strided(x, sizes, dense_strides(sizes, false, "loss"), dtype);
}

using LossResult = std::tuple<Tensor, Tensor, Tensor>;

// What a forward returns, uninitialised: with `stats` numbers a position.
struct LossTensors {
  Tensor loss, stats, gradient;
  bool has_gradient;

  LossTensors(const Tensor& x, Reduction reduction, int64_t stats, bool keep_gradient)
      : loss(empty_positions(x, reduction == Reduction::none, 0)),
        stats(empty_positions(x, true, stats)),
        gradient(keep_gradient ? empty_like_dense(x) : empty_vector(x, 0, dtype_number(x))),
        has_gradient(keep_gradient) {}

  // Of no logits at all: a mean over nothing is NaN, and of no classes nothing has been seen.
  LossResult of_nothing(Reduction reduction) {
    const bool mean = reduction == Reduction::mean;
    torch::stable::fill_(loss, mean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    torch::stable::fill_(stats, 0.0);
    return result();
  }

  LossResult result() const { return {loss, stats, gradient}; }
};

// The ops as torch calls them, of functions that take what belongs together as one.

template <LossResult (*kForward)(const Tensor&, const LossTarget&, bool)>
LossResult cross_entropy_op(const Tensor& input, const Tensor& target,
                            const OptionalTensor& partner, const OptionalTensor& lam,
                            double one_lam, const OptionalTensor& weight, int64_t ignore_index,
                            double label_smoothing, int64_t reduction,
                            const OptionalTensor& traced_smoothing, bool keep_gradient) {
  return kForward(input,
                  {target, partner, lam, one_lam, weight, ignore_index, label_smoothing, reduction,
                   traced_smoothing},
                  keep_gradient);
}

template <Tensor (*kBackward)(const LossBackward&, const LossTarget&)>
Tensor cross_entropy_backward_op(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& stats, const Tensor& target,
                                 const OptionalTensor& partner, const OptionalTensor& lam,
                                 double one_lam, const OptionalTensor& weight, int64_t ignore_index,
                                 double label_smoothing, int64_t reduction,
                                 const OptionalTensor& traced_smoothing) {
  return kBackward({grad_output, input, stats},
                   {target, partner, lam, one_lam, weight, ignore_index, label_smoothing, reduction,
                    traced_smoothing});
}

template <LossResult (*kForward)(const Tensor&, const Teacher&, const LossTarget&, bool)>
LossResult distillation_op(const Tensor& input, const Tensor& teacher, const OptionalTensor& target,
                           const OptionalTensor& partner, const OptionalTensor& lam, double one_lam,
                           const OptionalTensor& weight, int64_t ignore_index,
                           double label_smoothing, int64_t reduction,
                           const OptionalTensor& traced_smoothing, double temperature, double alpha,
                           const OptionalTensor& traced_softness, bool keep_gradient) {
  return kForward(input, {teacher, temperature, alpha, traced_softness},
                  {target, partner, lam, one_lam, weight, ignore_index, label_smoothing, reduction,
                   traced_smoothing},
                  keep_gradient);
}

template <Tensor (*kBackward)(const LossBackward&, const Teacher&, const LossTarget&)>
Tensor distillation_backward_op(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                const Tensor& teacher, const OptionalTensor& target,
                                const OptionalTensor& partner, const OptionalTensor& lam,
                                double one_lam, const OptionalTensor& weight, int64_t ignore_index,
                                double label_smoothing, int64_t reduction,
                                const OptionalTensor& traced_smoothing, double temperature,
                                double alpha, const OptionalTensor& traced_softness) {
  return kBackward({grad_output, input, stats}, {teacher, temperature, alpha, traced_softness},
                   {target, partner, lam, one_lam, weight, ignore_index, label_smoothing, reduction,
                    traced_smoothing});
}

}  // namespace reg_kernels
