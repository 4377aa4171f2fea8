// The instruction sets that the CPU kernels are compiled for, and which of them this machine runs.
//
// A file csrc/cpu/<name>.simd.cpp is compiled once for each, with RK_ISA as the name of an inline
// namespace: plain loops that the compiler vectorises, the same bits from each. It includes no
// torch header and no standard template, so that no function built for AVX-512 can stand in for
// another.
#pragma once

#include "reg_kernels/portable.h"

namespace reg_kernels {

enum class Isa { baseline, avx2, avx512 };

// The best that this machine has, or what set_isa was told.
Isa current_isa();

// Takes a less capable one, for tests and measurements; throws std::invalid_argument for one that
// this machine or this build lacks.
void set_isa(Isa isa);

// Declares `result name arguments` in each instruction set's namespace.
#define RK_DECLARE_LEAF_IN(isa, result, name, arguments) \
  namespace isa {                                        \
  result name arguments;                                 \
  }

#if defined(__x86_64__) && !defined(RK_ONE_ISA)
#define RK_DECLARE_LEAF(result, name, arguments)        \
  RK_DECLARE_LEAF_IN(baseline, result, name, arguments) \
  RK_DECLARE_LEAF_IN(avx2, result, name, arguments)     \
  RK_DECLARE_LEAF_IN(avx512, result, name, arguments)
// The leaf of this name for the current instruction set.
#define RK_LEAF(name)                                                        \
  (::reg_kernels::current_isa() == ::reg_kernels::Isa::avx512 ? avx512::name \
   : ::reg_kernels::current_isa() == ::reg_kernels::Isa::avx2 ? avx2::name   \
                                                              : baseline::name)
#else
#define RK_DECLARE_LEAF(result, name, arguments) \
  RK_DECLARE_LEAF_IN(baseline, result, name, arguments)
#define RK_LEAF(name) (baseline::name)
#endif

}  // namespace reg_kernels
