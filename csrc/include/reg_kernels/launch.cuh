// Launching a kernel: on a GPU, or on the CPU where RK_CUDA_ON_CPU asks for the emulation that the
// tests run the very same kernels through.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "portable.h"

#if defined(RK_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#define RK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
// The same for a kernel whose blocks wait for each other: they all run at once, or the launch is
// refused. Of one argument, a variable.
#define RK_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, argument)      \
  do {                                                                                  \
    void* rk_arguments[] = {&(argument)};                                               \
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), (grid), (block), \
                                rk_arguments, (shared_bytes), (stream));                \
  } while (false)
// The block's shared memory, as many bytes as the launch asks for, as `T* name`. Bytes in every
// kernel, since one name can have one type only; aligned for any vector.
#define RK_SHARED(T, name)                                          \
  extern __shared__ __align__(16) unsigned char rk_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(rk_shared_memory)
#endif

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

// After every launch, and any other call: a refused one is an error here, not a wrong result later.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) +
                             ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

}  // namespace cuda
RK_NAMESPACE_END
