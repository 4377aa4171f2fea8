#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace reg_kernels {
namespace {

bool is_built(Isa isa) {
  using enum Isa;
  for (const Isa built : {RK_BUILT_ISAS}) {
    if (isa == built) return true;
  }
  return false;
}

// The levels that setup.py's flags name, whole: the compiler may use any part of them.
bool has_machine(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return __builtin_cpu_supports("x86-64-v4");
  if (isa == Isa::avx2) return __builtin_cpu_supports("x86-64-v3");
#endif
  return isa == Isa::baseline;
}

Isa best_isa() {
  for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
    if (has_isa(isa)) return isa;
  }
  throw std::runtime_error(
      "reg_kernels: built for an instruction set that this CPU lacks (REG_KERNELS_ISA): build it "
      "again here");
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

bool has_isa(Isa isa) { return is_built(isa) && has_machine(isa); }

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (!has_isa(isa)) {
    throw std::invalid_argument(
        "set_isa: name must be that of an instruction set that was built "
        "and that this CPU has");
  }
  chosen().store(isa, std::memory_order_relaxed);
}

}  // namespace reg_kernels
