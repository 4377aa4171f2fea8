// What lets one header serve g++, nvcc and every instruction set the CPU kernels are built for.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RK_HD __host__ __device__ __forceinline__
#define RK_UNROLL _Pragma("unroll")
#define RK_NO_UNROLL _Pragma("unroll 1")
#define RK_PRAGMA(words) _Pragma(#words)
#define RK_UNROLL_BY(count) RK_PRAGMA(unroll count)
#else
#define RK_HD inline __attribute__((always_inline))
#define RK_UNROLL
#define RK_NO_UNROLL
#define RK_UNROLL_BY(count)
#endif

// csrc/cpu/ is compiled once for each instruction set, with RK_ISA naming it. An inline function
// compiled for AVX-512 must never be the copy that the linker keeps for a machine without it, so
// everything below include/ lives in an inline namespace of that name.
#ifndef RK_ISA
#define RK_ISA baseline
#endif

#define RK_NAMESPACE_BEGIN \
  namespace reg_kernels {  \
  inline namespace RK_ISA {
#define RK_NAMESPACE_END \
  }                      \
  }

// Opened here, so that naming it elsewhere (csrc/cpu/isa.h) finds it inline already.
RK_NAMESPACE_BEGIN

// What kernels on any processor count with: no standard template, for the same reason.
RK_HD constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
RK_HD constexpr int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
template <typename A, typename B>
RK_HD constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

RK_NAMESPACE_END
