// A subset of a batch's samples, for the CPU and the CUDA kernels: which they are, and what is
// added to one.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "portable.h"

RK_NAMESPACE_BEGIN

// The samples of a batch, each once: those that are kept, then the others.
struct SubsetRows {
  const int64_t *kept, *dropped;
  int64_t count, samples;  // that are kept, and in all

  RK_HD int64_t at(int64_t i) const { return i < count ? kept[i] : dropped[i - count]; }
};

template <typename T>
RK_HD T scaled(T x, compute_t<T> scale) {
  return store<T>(load(x) * scale);
}
template <typename T>
RK_HD T add_scaled(T residual, T x, compute_t<T> scale) {
  return store<T>(add_apart(load(residual), load(x) * scale));
}

RK_NAMESPACE_END
