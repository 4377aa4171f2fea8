// 16-byte copies from global to shared memory that take no register and no thread's time: a thread
// asks for them far ahead, in groups, and waits for a group before it reads what that has brought.
// A thread sees its own copies; for those of others there would have to be a barrier as well.
#pragma once

#include "launch.cuh"
#include "vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

#if defined(RK_CUDA_ON_CPU)
using cuda_on_cpu::commit_copies;
using cuda_on_cpu::wait_for_copies;

inline void copy_async(VectorBits* to, const void* from, bool present) {
  cuda_on_cpu::copy_async(to, from, sizeof(VectorBits), present);
}
#else
// Zeros where the source is not present; it is not read then.
__device__ __forceinline__ void copy_async(VectorBits* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(present ? kVectorBytes : 0)
               : "memory");
}

// Ends a group, which may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups but the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

}  // namespace cuda
RK_NAMESPACE_END
