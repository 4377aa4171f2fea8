// Image augmentation on the CPU key: torch's thread pool over the samples, each of them in the
// hands of one thread from its pixels to its result.
#include "augment.h"

#include "../torch/augment.h"
#include "cache.h"

namespace reg_kernels {
namespace {

constexpr int64_t kGrain = 16384;  // elements of the result that a thread takes at the least

Tensor augment(const Tensor& pixels, const Tensor& images, const Tensor& program, int64_t channels,
               bool channels_last, int64_t height, int64_t width, ScalarType dtype,
               bool result_channels_last, bool exact) {
  const Call call("augment", pixels);
  AugmentTask task{augment_batch(call, pixels, images, program, channels, channels_last, height,
                                 width, dtype, result_channels_last, exact),
                   false};
  Tensor result = augment_result(call, pixels, task.batch, dtype);
  if (result.numel() == 0) return result;
  task.batch.result = call.written(result, "result");
  const auto bytes = result.numel() * static_cast<int64_t>(result.element_size());
  task.stream = bytes >= last_level_cache_bytes() / 2;
  const auto leaf = RK_LEAF(augment_range);
  const int64_t grain = std::max<int64_t>(1, kGrain * task.batch.samples / result.numel());
  torch::stable::parallel_for(0, task.batch.samples, grain,
                              [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, library) {
  library.impl("augment", TORCH_BOX(&augment));
}

}  // namespace reg_kernels
