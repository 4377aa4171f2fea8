// The instruction sets that the CPU kernels are compiled for, and which of them this machine runs.
//
// A file csrc/cpu/<name>.simd.cpp is compiled once for each, with RK_ISA as the name of an inline
// namespace: plain loops that the compiler vectorises, the same bits from each. It includes no
// torch header and no standard template, so that no function built for AVX-512 can stand in for
// another.
#pragma once

#include "reg_kernels/portable.h"

// Calls X(name, more...) for each instruction set of this architecture, the least capable one
// first; setup.py has the compiler's options for each. An architecture that neither knows runs the
// portable code, `baseline`.
#if defined(__x86_64__)
#define RK_FOR_ISAS(X, ...) X(baseline, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__)
#elif defined(__aarch64__)
#define RK_FOR_ISAS(X, ...) X(neon, __VA_ARGS__)
#else
#define RK_FOR_ISAS(X, ...) X(baseline, __VA_ARGS__)
#endif

namespace reg_kernels {

#define RK_ISA_AND_COMMA(isa, ...) isa,
enum class Isa { RK_FOR_ISAS(RK_ISA_AND_COMMA) };

#define RK_ISA_AND_NAME(isa, ...) {Isa::isa, #isa},
struct NamedIsa {
  Isa isa;
  const char* name;
};
constexpr NamedIsa kIsas[] = {RK_FOR_ISAS(RK_ISA_AND_NAME)};

// The best that there is, or what reg_kernels_set_isa (isa_names.h) was told; throws
// std::runtime_error where this machine has none of those that were built.
Isa current_isa();

// Whether it was built (REG_KERNELS_ISA) and this machine has it.
bool has_isa(Isa isa);

// Declares `result name arguments` in each instruction set's namespace. Weak, so that one that was
// not built is null: what else is compiled does not depend on which are.
#define RK_DECLARE_LEAF_IN(isa, result, name, arguments) \
  namespace isa {                                        \
  result __attribute__((weak)) name arguments;           \
  }
#define RK_DECLARE_LEAF(result, name, arguments) \
  RK_FOR_ISAS(RK_DECLARE_LEAF_IN, result, name, arguments)

// The leaf of this name for the current instruction set.
#define RK_LEAF_IN(isa, name) ::reg_kernels::current_isa() == ::reg_kernels::Isa::isa ? &isa::name:
#define RK_LEAF(name) (RK_FOR_ISAS(RK_LEAF_IN, name) nullptr)

}  // namespace reg_kernels
