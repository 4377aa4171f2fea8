#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace reg_kernels {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  // What -march=x86-64-v4 and -march=x86-64-v3 assume, as far as the kernels use it.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
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
