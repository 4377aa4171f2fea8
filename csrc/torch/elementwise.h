// The arguments of an op of the random elementwise family as both launchers, CPU and CUDA, read
// them, checked for what memory safety rests on; and the functions that are registered.
#pragma once

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/elementwise.h"

namespace reg_kernels {

// A call of one of an op's forms.
struct ElementwiseCall {
  Call call;
  DrawnFor drawn_for;
  const Tensor& x;
  const Tensor& y;  // x itself, in place
  const OptionalTensor& residual;
  const OptionalTensor& layer_scale;
  double number;                 // Op::kNumber
  double options[kMostOptions];  // Op::Options
  const Tensor& rng_state;
  int64_t element_offset;
  const OptionalTensor& traced_number;  // which counts instead, if there

  // How x lies in memory, where one draw is for more than an element.
  ChannelLayout layout() const {
    if (drawn_for == DrawnFor::element) return {1, 1, false};
    return drawn_for == DrawnFor::channel ? channel_layout(x, call.op) : sample_layout(x, call.op);
  }

  void check(const Number& allowed) const {
    check_element_offset(element_offset, call.op);
    check_number(number, allowed, call.op);
  }

  const void* residual_data() const { return data_like(call, x, residual, "residual"); }

  // What a layer scale is to x in storage order: it broadcasts along one dimension, whose channels
  // lie apart by its stride.
  LayerScale scale_of_channels() const {
    if (!layer_scale) return {nullptr, 1, 1};
    const ScalarType compute = compute_type_of(dtype_of(x, call.op));
    // One number is that of a channel which all elements lie in.
    LayerScale scale{call.vector(*layer_scale, compute, layer_scale->numel(), "layer_scale"), 1,
                     std::max<int64_t>(x.numel(), 1)};
    const int64_t missing = x.dim() - layer_scale->dim();
    bool fits = missing >= 0;
    for (int64_t d = 0; fits && d < layer_scale->dim(); ++d) {
      const int64_t size = layer_scale->size(d), at = d + missing;
      if (size == 1) continue;
      fits = at > 0 && x.size(at) == size && scale.channels == 1;
      scale.channels = size;
      scale.inner = x.stride(at);
    }
    RK_REQUIRE(fits, call.op, "layer_scale",
               "of one element, or broadcast along one dimension that is not the batch's",
               *layer_scale);
    return scale;
  }
};

// The functions that are registered for an op's forms, of which `run` runs each.
template <typename Op, void (*run)(const ElementwiseCall&), typename Options = Op::Options>
struct Elementwise;

template <typename Op, void (*run)(const ElementwiseCall&), typename... Option>
struct Elementwise<Op, run, Types<Option...>> {
  template <int kForm>
  static Tensor fresh(const Tensor& input, double number, Option... options,
                      const Tensor& rng_state, int64_t element_offset,
                      const OptionalTensor& traced) {
    return added<kForm>(input, {}, number, options..., rng_state, element_offset, traced);
  }

  template <int kForm>
  static Tensor added(const Tensor& input, const OptionalTensor& residual, double number,
                      Option... options, const Tensor& rng_state, int64_t element_offset,
                      const OptionalTensor& traced) {
    return scaled<kForm>(input, residual, {}, number, options..., rng_state, element_offset,
                         traced);
  }

  template <int kForm>
  static Tensor scaled(const Tensor& input, const OptionalTensor& residual,
                       const OptionalTensor& layer_scale, double number, Option... options,
                       const Tensor& rng_state, int64_t element_offset,
                       const OptionalTensor& traced) {
    constexpr Form form = Op::kForms[kForm];
    const Call call(form.name, input);
    if constexpr (form.drawn_for == DrawnFor::channel) channel_layout(input, call.op);
    if constexpr (form.drawn_for == DrawnFor::sample) sample_layout(input, call.op);
    const Tensor x = form.drawn_for == DrawnFor::element ? dense(call, input) : input;
    Tensor y = empty_like_dense(x);
    run({call,
         form.drawn_for,
         x,
         y,
         residual,
         layer_scale,
         number,
         {static_cast<double>(options)...},
         rng_state,
         element_offset,
         traced});
    return y;
  }

  template <int kForm>
  static void in_place(const Tensor& input, double number, Option... options,
                       const Tensor& rng_state, int64_t element_offset,
                       const OptionalTensor& traced) {
    constexpr Form form = Op::kForms[kForm];
    const Call call(form.in_place, input);
    if constexpr (form.drawn_for == DrawnFor::element) check_dense(input, call.op, "input");
    run({call,
         form.drawn_for,
         input,
         input,
         {},
         {},
         number,
         {static_cast<double>(options)...},
         rng_state,
         element_offset,
         traced});
  }

  template <typename Library, int kForm = 0>
  static void register_in(Library& m) {
    if constexpr (kForm < static_cast<int>(std::size(Op::kForms))) {
      constexpr Form form = Op::kForms[kForm];
      if constexpr (kScalesChannels<Op>) {
        m.impl(form.name, TORCH_BOX(&scaled<kForm>));
      } else if constexpr (Op::kAdds) {
        m.impl(form.name, TORCH_BOX(&added<kForm>));
      } else {
        m.impl(form.name, TORCH_BOX(&fresh<kForm>));
      }
      if constexpr (form.in_place != nullptr) m.impl(form.in_place, TORCH_BOX(&in_place<kForm>));
      register_in<Library, kForm + 1>(m);
    }
  }
};

}  // namespace reg_kernels
