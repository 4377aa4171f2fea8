// What CUDA launchers need of torch: the device, the stream, rng_state, the element type.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"
#include "reg_kernels/dtypes.h"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/rng_state.cuh"

namespace reg_kernels {
namespace cuda {

// Makes x's device current for its lifetime, and holds the stream to launch on.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launch(const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}

 private:
  static cudaStream_t current_stream(int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

// The random state of a call, from the host by value or on the device by its pointer.
inline RngState read_rng_state(const Call& call, const Tensor& rng_state) {
  const int64_t* state = rng_state_data(call, rng_state);
  if (!rng_state.is_cpu()) return {state, 0, 0};
  return {nullptr, static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1])};
}

// Device memory from torch's allocator, as a launcher asks for it. `memory` may be freed as soon as
// the kernels are launched: what comes after them on the stream is the first to get it again.
inline auto allocator(const Tensor& x, std::optional<Tensor>& memory) {
  return [&x, &memory](int64_t bytes) {
    memory = empty_vector(x, bytes, aoti_torch_dtype_uint8());
    return memory->mutable_data_ptr();
  };
}

}  // namespace cuda
}  // namespace reg_kernels
