#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace reg_kernels {
namespace {

Isa best_isa() {
#if defined(__x86_64__) && !defined(RK_ONE_ISA)
  // The levels that setup.py's flags name, whole: the compiler may use any part of them.
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (isa > best_isa()) throw std::invalid_argument("set_isa: this CPU lacks that instruction set");
  chosen().store(isa, std::memory_order_relaxed);
}

}  // namespace reg_kernels
