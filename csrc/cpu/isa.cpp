#include "isa.h"

#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>

namespace reg_kernels {
namespace {

bool is_built(Isa isa) {
  using enum Isa;
  for (const Isa built : {RK_BUILT_ISAS}) {
    if (isa == built) return true;
  }
  return false;
}

// The levels that setup.py's flags name, whole: the compiler may use any part of them. Every 64-bit
// Arm processor has NEON.
bool has_machine([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return __builtin_cpu_supports("x86-64-v4");
  if (isa == Isa::avx2) return __builtin_cpu_supports("x86-64-v3");
#endif
  return true;
}

Isa best_isa() {
  for (int64_t i = std::size(kIsas); i-- > 0;) {
    if (has_isa(kIsas[i].isa)) return kIsas[i].isa;
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

void set_isa(const char* name) {
  std::string names;
  for (const NamedIsa& each : kIsas) {
    if (!has_isa(each.isa)) continue;
    if (std::string(name) == each.name) {
      chosen().store(each.isa, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(each.name);
  }
  throw std::invalid_argument("set_isa: name must be one that was built and that this CPU has (" +
                              names + "), got " + name);
}

}  // namespace reg_kernels
