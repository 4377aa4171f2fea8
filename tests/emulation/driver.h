// What the programs in this directory share: counted comparisons and the program's end.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "reg_kernels/launch.cuh"
#include "values.h"

namespace driver {

inline int64_t comparisons = 0;
inline int64_t failures = 0;

// Counts one comparison; `describe` says what was compared, and is asked only when it failed.
template <typename Describe>
void expect(bool passed, const Describe& describe) {
  constexpr int kShown = 10;
  ++comparisons;
  if (!passed && ++failures <= kShown) {
    std::printf("FAILED %s\n", std::string(describe()).c_str());
  }
}

template <typename T>
std::string bits_of(const T& value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  char digits[24];
  std::snprintf(digits, sizeof(digits), "0x%0*llx", static_cast<int>(2 * sizeof(T)),
                static_cast<unsigned long long>(bits));
  return digits;
}

// Element by element, bit for bit.
template <typename T, typename Describe>
void expect_same_bits(const Buffer<T>& actual, const T* expected, const Describe& describe) {
  for (int64_t i = 0; i < actual.size(); ++i) {
    expect(std::memcmp(actual.data() + i, expected + i, sizeof(T)) == 0, [&] {
      return std::string(describe()) + " at " + std::to_string(i) + ": " +
             bits_of(actual.data()[i]) + ", expected " + bits_of(expected[i]);
    });
  }
  expect(actual.untouched(),
         [&] { return std::string(describe()) + ": wrote in front of its output"; });
}

// That a kernel which `launch` starts asserts `condition`, and not another one. In a child process,
// since the first false assertion ends it.
template <typename Launch, typename Describe>
void expect_assertion(const Launch& launch, const char* condition, const Describe& describe) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) std::abort();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    launch();
    std::_Exit(0);
  }
  close(ends[1]);
  std::string said;
  char part[256];
  for (ssize_t count; (count = read(ends[0], part, sizeof(part))) > 0;) said.append(part, count);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const std::string expected = std::string("asserts ") + condition + "\n";
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 1 && said.ends_with(expected), [&] {
    return std::string(describe()) + ": expected that it " + expected + "but it said: " + said;
  });
}

// Every program's first argument is the order that its threads run in.
inline bool set_order(std::string_view order) {
  cuda_on_cpu::reversed = order == "reversed";
  cuda_on_cpu::mixed = order == "mixed";
  if (order == "forward" || cuda_on_cpu::reversed || cuda_on_cpu::mixed) return true;
  std::fprintf(stderr, "the order is forward, reversed or mixed\n");
  return false;
}

inline int finish() {
  std::printf("%lld comparisons, %lld failed\n", static_cast<long long>(comparisons),
              static_cast<long long>(failures));
  return comparisons > 0 && failures == 0 ? 0 : 1;
}

}  // namespace driver
