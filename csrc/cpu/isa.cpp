#include "isa.h"

#include <atomic>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "isa_names.h"

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

// The best one's place, -1 where there is none.
int best_place() {
  int place = std::size(kIsas);
  while (--place >= 0 && !has_isa(kIsas[place].isa)) {
  }
  return place;
}

std::atomic<int>& chosen() {
  static std::atomic<int> place{best_place()};
  return place;
}

}  // namespace

bool has_isa(Isa isa) { return is_built(isa) && has_machine(isa); }

Isa current_isa() {
  const int place = chosen().load(std::memory_order_relaxed);
  if (place < 0) {
    throw std::runtime_error(
        "reg_kernels: built for an instruction set that this CPU lacks (REG_KERNELS_ISA): build it "
        "again here");
  }
  return static_cast<Isa>(place);
}

}  // namespace reg_kernels

using namespace reg_kernels;

const char* reg_kernels_isa() {
  const int place = chosen().load(std::memory_order_relaxed);
  return place < 0 ? nullptr : kIsas[place].name;
}

const char* reg_kernels_isa_at(int place) {
  for (const auto& [isa, name] : kIsas) {
    if (has_isa(isa) && place-- == 0) return name;
  }
  return nullptr;
}

int reg_kernels_set_isa(const char* name) {
  for (int place = 0; place < static_cast<int>(std::size(kIsas)); ++place) {
    if (!has_isa(kIsas[place].isa) || std::strcmp(name, kIsas[place].name) != 0) continue;
    chosen().store(place, std::memory_order_relaxed);
    return 1;
  }
  return 0;
}
