// Mixup's arguments as both launchers, CPU and CUDA, read them: what ops/mixup.py declares, checked
// for what memory safety rests on, as raw pointers.
#pragma once

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/mixup_math.h"

namespace reg_kernels {

// Calls f with a value of the element type of a batch: a floating-point type, or bytes.
template <typename F>
void for_mixup_input(const Tensor& x, const char* op, const F& f) {
  if (x.scalar_type() == ScalarType::Byte) return f(uint8_t{});
  for_dtype(x, op, f);
}

// float64 where input or output is, else float32: what a batch is computed in.
inline bool computes_in_double(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == ScalarType::Double || y.scalar_type() == ScalarType::Double;
}

// An uninitialised tensor of x's shape in another dtype, contiguous or with the channels last.
inline Tensor empty_batch(const Tensor& x, ScalarType dtype, bool channels_last, const char* op) {
  RK_REQUIRE(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                 dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
             op, "dtype", "one of float64, float32, float16, bfloat16", dtype_name(dtype));
  RK_REQUIRE(!channels_last || x.dim() >= 2, op, "channels_last", "false without channels", x);
  const auto given = x.sizes();
  const std::vector<int64_t> sizes(given.begin(), given.end());
  const std::vector<int64_t> strides = dense_strides(sizes, channels_last, op);
  return empty_strided(x, sizes, strides, dtype_number(dtype));
}

inline const int64_t* int64_values(const Call& call, const OptionalTensor& tensor, int64_t count,
                                   const char* name) {
  if (!tensor) return nullptr;
  return static_cast<const int64_t*>(call.vector(*tensor, ScalarType::Long, count, name));
}

// The blend of a batch like x: its shape alone is read.
inline MixupBlend mixup_blend(const Call& call, const Tensor& x, const OptionalTensor& lam,
                              double one_lam, const OptionalTensor& index,
                              const OptionalTensor& boxes) {
  MixupBlend blend{};
  blend.samples = x.size(0);
  blend.height = x.dim() >= 2 ? x.size(x.dim() - 2) : 1;
  blend.width = x.size(x.dim() - 1);
  blend.one_lam_for_all = true;
  blend.one_lam = one_lam;
  if (lam) set_shares(call, *lam, blend.samples, blend);
  blend.index = int64_values(call, index, blend.samples, "index");
  if (boxes) {
    RK_REQUIRE(x.dim() >= 4, call.op, "boxes", "None but for images (N, C, ..., H, W)", x);
    blend.one_box = boxes->numel() == 4;
    blend.boxes = int64_values(
        call, boxes, blend.one_box ? 4 : checked_product(4, blend.samples, call.op), "boxes");
  }
  return blend;
}

// The data of `values`, (C,) in the type that x and y are computed in; null where there are none.
inline const void* mixup_constants(const Call& call, const OptionalTensor& values, const Tensor& x,
                                   const Tensor& y, const char* name) {
  if (!values) return nullptr;
  const auto dtype = computes_in_double(x, y) ? ScalarType::Double : ScalarType::Float;
  return call.vector(*values, dtype, x.dim() >= 2 ? x.size(1) : 1, name);
}

// The samples by their partner, and where those of each start: both or neither.
struct MixupReceivers {
  const int64_t *samples, *starts;
};

inline MixupReceivers mixup_receivers(const Call& call, const MixupBlend& blend,
                                      const OptionalTensor& receivers,
                                      const OptionalTensor& starts) {
  RK_REQUIRE(receivers.has_value() == starts.has_value(), call.op, "receivers and starts",
             "given together or not", "one of them");
  if (!receivers) return {nullptr, nullptr};
  RK_REQUIRE(starts->numel() - 1 == blend.samples, call.op, "starts",
             words("of one element more than the ", blend.samples, " samples"), *starts);
  return {int64_values(call, receivers, blend.samples, "receivers"),
          int64_values(call, starts, starts->numel(), "starts")};
}

// What mixup_ reads by while it overwrites the input.
inline void check_apart_from_input(const char* op, const Tensor& input, const OptionalTensor& lam,
                                   const OptionalTensor& index, const OptionalTensor& boxes,
                                   const OptionalTensor& scale, const OptionalTensor& shift) {
  check_apart(op, input, lam, "lam");
  check_apart(op, input, index, "index");
  check_apart(op, input, boxes, "boxes");
  check_apart(op, input, scale, "scale");
  check_apart(op, input, shift, "shift");
}

}  // namespace reg_kernels
