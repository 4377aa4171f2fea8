// What the programs in this directory share. Each calls the leaves of one csrc/cpu/*.simd.cpp, by
// its own declaration of them, over types, layouts, options, edges and tails, and prints a line a
// call: what was called, and a digest of what it wrote. Run for two instruction sets, on one
// machine or on two, it prints the same lines, or names what differs.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/isa_names.h"
#include "values.h"

namespace isas {

using namespace reg_kernels;
using driver::below;
using driver::Buffer;
using driver::kName;

template <typename T>
constexpr DType kDType = DType::float32;
template <>
inline constexpr DType kDType<double> = DType::float64;
template <>
inline constexpr DType kDType<float16> = DType::float16;
template <>
inline constexpr DType kDType<bfloat16> = DType::bfloat16;

// Calls f(T{}) for each type of an element.
template <typename F>
void for_types(const F& f) {
  for (const DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    for_dtype(dtype, f);
  }
}

// Every bit pattern there is, NaNs among them; of float many that lie in the middle of two float16
// or of two bfloat16.
template <typename T>
Buffer<T> any_values(int64_t count) {
  Buffer<T> values(count, 0);
  values.fill_with_bits(static_cast<uint64_t>(below(1 << 30)));
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t kept[] = {~0u, ~0xfffu, ~0x7fffu};
      values.data()[i] = bit_cast<float>(bit_cast<uint32_t>(values.data()[i]) & kept[i % 3]);
    }
  }
  return values;
}

// Numbers in [-range, range), zeros of both signs and subnormal numbers among them.
template <typename T>
Buffer<T> numbers(int64_t count, double range = 8.0) {
  Buffer<T> values(count, 0);
  for (int64_t i = 0; i < count; ++i) {
    double value = (driver::uniform() * 2.0 - 1.0) * range;
    switch (below(32)) {
      case 0: value = 0.0; break;
      case 1: value = -0.0; break;
      case 2: value *= sizeof(T) == 8 ? 0x1p-1030 : 0x1p-130; break;
      case 3: value *= 0x1p-14; break;  // a subnormal float16
    }
    values.data()[i] = store<T>(static_cast<compute_t<T>>(value));
  }
  return values;
}

// What was written, in one number. Which NaN an operation makes is the processor's own choice, so
// that all of them count as one.
class Digest {
 public:
  template <typename T>
  void add(const T* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) add(values[i]);
  }
  template <typename T>
  void add(const Buffer<T>& values) {
    add(values.data(), values.size());
  }

  // Prints the line of the call that wrote it.
  __attribute__((format(printf, 2, 3))) void report(const char* format, ...) const {
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf(": %016llx\n", static_cast<unsigned long long>(state_));
  }

 private:
  template <typename T>
  void add(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    if constexpr (!std::is_integral_v<T>) {
      if (load(value) != load(value)) bits = ~uint64_t{0};
    }
    state_ = (state_ ^ bits) * 0x9e3779b97f4a7c15ull;
    state_ ^= state_ >> 29;
  }

  uint64_t state_ = 0x243f6a8885a308d3ull;
};

// Calls f(begin, end) for three parts of what there is to do, which begin at multiples of `unit`. A
// program that ThreadSanitizer is built into does so at once, each from a thread of its own:
// torch's threads take such parts in any order.
template <typename F>
void share_out(int64_t begin, int64_t end, int64_t unit, const F& f) {
  constexpr int64_t kParts = 3;
#ifdef RK_PLANT_RACE
  const int64_t too_many = 1;
#else
  const int64_t too_many = 0;
#endif
  std::vector<std::thread> threads;
  const int64_t first = begin / unit, units = ceil_div(end, unit) - first;
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t from = max(begin, (first + units * part / kParts) * unit);
    const int64_t to = min(end, (first + units * (part + 1) / kParts) * unit + too_many);
    if (from >= to) continue;
#ifdef __SANITIZE_THREAD__
    threads.emplace_back([&f, from, to] { f(from, to); });
#else
    f(from, to);
#endif
  }
  for (std::thread& thread : threads) thread.join();
}

// Calls every leaf, in one program.
void call_leaves();

}  // namespace isas

// The C library's own functions, float64's exponentials among them, differ in the last bit from one
// library to the next. These stand in for them in every program: of their shape, which is enough.
extern "C" {

double exp(double x) noexcept {
  if (!(x > -700.0)) return x != x ? x : 0.0;
  if (x > 700.0) return std::numeric_limits<double>::infinity();
  const auto n = static_cast<int64_t>(x * 1.4426950408889634 + (x < 0 ? -0.5 : 0.5));
  const double r = x - static_cast<double>(n) * 0.6931471805599453;
  double p = 1.0;
  for (int k = 12; k > 0; --k) p = p * r / k + 1.0;
  return p * reg_kernels::bit_cast<double>((n + 1023) << 52);
}

double log(double x) noexcept {
  if (!(x > 0)) return x == 0 ? -std::numeric_limits<double>::infinity() : x - x;
  if (x - x != 0) return x;
  const auto bits = reg_kernels::bit_cast<int64_t>(x);
  const double m = reg_kernels::bit_cast<double>((bits & 0xfffffffffffffll) | 0x3ff0000000000000ll);
  const double s = (m - 1.0) / (m + 1.0);
  double p = 0.0;
  for (int k = 19; k > 0; k -= 2) p = p * s * s + 1.0 / k;
  return 2.0 * s * p + static_cast<double>((bits >> 52) - 1023) * 0.6931471805599453;
}

float logf(float x) noexcept { return static_cast<float>(log(static_cast<double>(x))); }

double erf(double x) noexcept {
  if (!(x * x < 1e300)) return x != x ? x : x < 0 ? -1.0 : 1.0;
  return x / sqrt(1.0 + x * x);
}

}  // extern "C"

int main(int, char** arguments) {
  try {
    if (arguments[1] && !reg_kernels_set_isa(arguments[1])) return 2;
    isas::call_leaves();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
