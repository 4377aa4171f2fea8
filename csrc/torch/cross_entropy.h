// What the losses of logits are given, as both launchers, CPU and CUDA, read it: what ops/_loss.py
// declares, checked for what memory safety rests on, as raw pointers.
#pragma once

#include <limits>
#include <tuple>

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/cross_entropy_math.h"

namespace reg_kernels {

using OptionalTensor = std::optional<Tensor>;

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

// Whether the tensor has x's shape and strides.
inline bool has_layout_of(const Tensor& x, const Tensor& tensor) {
  bool alike = tensor.dim() == x.dim();
  for (int64_t d = 0; alike && d < x.dim(); ++d) {
    alike = tensor.size(d) == x.size(d) &&
            (x.size(d) <= 1 || x.numel() == 0 || tensor.stride(d) == x.stride(d));
  }
  return alike;
}

// What a compiled program passes instead of `count` numbers, so that they may vary; or null.
inline const double* traced_numbers(const OptionalTensor& numbers, int64_t count, const char* op) {
  if (!numbers) return nullptr;
  STD_TORCH_CHECK(numbers->scalar_type() == ScalarType::Double && numbers->is_contiguous() &&
                      numbers->numel() == count,
                  op, ": traced numbers must be ", count, " in float64, contiguous");
  return static_cast<const double*>(numbers->const_data_ptr());
}

inline LossInput loss_input(const Tensor& x, const OptionalTensor& target,
                            const OptionalTensor& partner, const OptionalTensor& lam,
                            double one_lam, const OptionalTensor& weight, int64_t ignore_index,
                            double smoothing, int64_t reduction,
                            const OptionalTensor& traced_smoothing, const char* op) {
  LossInput in{};
  in.dtype = dtype_of(x, op);
  in.layout = channel_layout(x, op);
  in.classes_last = in.layout.channels_last || in.layout.length == 1;
  in.numel = x.numel();
  in.positions = x.size(0) * in.layout.length;
  in.x = x.const_data_ptr();
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": unknown reduction ", reduction);
  in.reduction = static_cast<Reduction>(reduction);
  const ScalarType compute = in.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  if (weight) {
    STD_TORCH_CHECK(weight->scalar_type() == compute && weight->is_contiguous() &&
                        weight->numel() == in.layout.channels,
                    op, ": weight must be contiguous, one for each class, in the compute type");
    in.weight = weight->const_data_ptr();
  }
  in.labels.positions = in.layout.length;
  in.labels.classes = in.layout.channels;
  in.labels.ignore_index = ignore_index;
  in.labels.smoothing = smoothing;
  in.labels.traced_smoothing = traced_numbers(traced_smoothing, 1, op);
  in.labels.one_lam_for_all = true;
  in.labels.one_lam = one_lam;
  if (!target) {
    STD_TORCH_CHECK(!partner, op, ": partner labels need labels");
    return in;
  }
  if (target->scalar_type() != ScalarType::Long) {
    STD_TORCH_CHECK(has_layout_of(x, *target) && (target->scalar_type() == x.scalar_type() ||
                                                  target->scalar_type() == compute),
                    op, ": probabilities must have the input's shape, strides and type");
    in.probabilities = target->const_data_ptr();
    in.probabilities_dtype = dtype_of(*target, op);
    return in;
  }
  const auto labels = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() &&
                        tensor.numel() == in.positions,
                    op, ": labels must be contiguous int64, one for each position");
    return static_cast<const int64_t*>(tensor.const_data_ptr());
  };
  in.labels.labels = labels(*target);
  if (!partner) return in;
  in.labels.partner_labels = labels(*partner);
  if (lam) {
    STD_TORCH_CHECK(lam->is_contiguous() && (lam->numel() == 1 || lam->numel() == x.size(0)), op,
                    ": lam must be a contiguous tensor of 1 or of one for each sample");
    in.labels.lam = {const_cast<void*>(lam->const_data_ptr()), dtype_of(*lam, op)};
    in.labels.one_lam_for_all = lam->numel() == 1;
  }
  return in;
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
  std::vector<int64_t> strides(sizes.size());
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = expected;
    expected *= sizes[d];
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  const int32_t dtype = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64()
                                                              : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  x.get_device_index(), &handle));
  return Tensor(handle);
}

// What a forward returns for no logits at all: a mean over nothing is NaN.
inline std::tuple<Tensor, Tensor, Tensor> loss_of_nothing(const Tensor& x, Reduction reduction,
                                                          int64_t stats, bool keep_gradient) {
  Tensor loss = empty_positions(x, reduction == Reduction::none, 0);
  const bool mean = reduction == Reduction::mean;
  torch::stable::fill_(loss, mean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  return {loss, empty_positions(x, true, stats),
          keep_gradient ? empty_like_dense(x) : empty_vector(x, 0, dtype_number(x))};
}

}  // namespace reg_kernels
