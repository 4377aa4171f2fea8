// An op of the random elementwise family on the CUDA key: tensors to raw pointers. The kernels are
// in elementwise.cuh. Compiled once for each op (elementwise/<op>.h, which comes first).
#include "elementwise.cuh"

#include "../torch/cuda.cuh"
#include "../torch/elementwise.h"

namespace reg_kernels {
namespace {

cuda::RateArgument rate_argument(const ElementwiseCall& a) {
  if (!a.traced_number) return rate_of<Op>(a.number);
  const double* value = traced_p_data(a.call, *a.traced_number);
  if (a.traced_number->is_cpu()) return rate_of<Op>(*value);
  return cuda::RateArgument(value);
}

void run(const ElementwiseCall& a) {
  const ChannelLayout layout = a.layout();
  a.check(Op::kNumber);
  const cuda::Launch launch(a.x);
  const cuda::RngState rng = cuda::read_rng_state(a.call, a.rng_state);
  const cuda::RateArgument rate = rate_argument(a);
  const auto launch_of = [&]<typename T>(T) {
    T* const y = static_cast<T*>(a.call.written(a.y, "input"));
    const T* const x = static_cast<const T*>(a.call.data(a.x, "input"));
    const auto beside = [&] {
      const auto* const residual = static_cast<const T*>(a.residual_data());
      if constexpr (kScalesChannels<Op>) {
        return cuda::Beside<Op, T>(residual, a.options, a.scale_of_channels());
      } else {
        return cuda::Beside<Op, T>(residual, a.options);
      }
    }();
    if (a.drawn_for == DrawnFor::element) {
      cuda::launch_elements<Op>(x, y, beside, a.x.numel(), a.element_offset, rate, rng,
                                launch.stream);
    } else {
      cuda::launch_channels<Op>(x, y, beside, a.x.numel(), layout, a.element_offset, rate, rng,
                                launch.stream);
    }
  };
  // An op that takes none has no kernels of bytes.
  using Byte = std::conditional_t<kTakesBytes<Op>, uint8_t, float>;
  if (kTakesBytes<Op> && a.x.scalar_type() == ScalarType::Byte) return launch_of(Byte{});
  for_dtype(a.x, a.call.op, launch_of);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) { Elementwise<Op, run>::register_in(m); }

}  // namespace reg_kernels
