// What a kernel asserts of the values it is handed, where asking on the host would mean to wait.
#pragma once

#include "launch.cuh"

// On a GPU a false one ends the kernel, and every later call of CUDA in the process fails with
// "device-side assert triggered". As torch's own assertions it also holds where NDEBUG is defined.
// To be asked by one thread of a block, or by all alike: the emulation ends at the first.
#if defined(RK_CUDA_ON_CPU)
#define RK_ASSERT(condition) cuda_on_cpu::require(condition, #condition)
#elif defined(__CUDA_ARCH__)
#define RK_ASSERT(condition) \
  ((condition) ? (void)0 : __assert_fail(#condition, __FILE__, __LINE__, __func__))
#else
#define RK_ASSERT(condition) ((void)0)  // nvcc's pass for the host, which runs no kernel
#endif
