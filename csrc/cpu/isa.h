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

// The best that there is, or what set_isa was told; throws std::runtime_error where this machine
// has none of those that were built.
Isa current_isa();

// Whether it was built (REG_KERNELS_ISA) and this machine has it.
bool has_isa(Isa isa);

// Takes a less capable one, for tests and measurements; throws std::invalid_argument for one that
// there is not.
void set_isa(Isa isa);

// Declares `result name arguments` in each instruction set's namespace. Weak, so that one that was
// not built is null: what else is compiled does not depend on which are.
#define RK_DECLARE_LEAF_IN(isa, result, name, arguments) \
  namespace isa {                                        \
  result __attribute__((weak)) name arguments;           \
  }

#if defined(__x86_64__)
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
