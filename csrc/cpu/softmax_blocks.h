// Pieces of a softmax over one row of logits, block by block: each is a plain loop over a block
// that lies in the first-level cache.
#pragma once

#include <cstdint>

#include "reg_kernels/dtypes.h"
#include "reg_kernels/softmax.h"
#include "stream.h"

RK_NAMESPACE_BEGIN

constexpr int64_t kBlock = 1024;  // logits

// sums[0] becomes the sum of 2 kHalf lanes. A loop over the halves would stay one.
template <int64_t kHalf, typename C>
RK_HD void add_lanes(C* sums) {
#pragma omp simd
  for (int64_t j = 0; j < kHalf; ++j) sums[j] += sums[j + kHalf];
  if constexpr (kHalf > 1) add_lanes<kHalf / 2>(sums);
}

// The sum of f(i) for i in [0, count), f inlined: in lanes, so that all instruction sets add up in
// the same order.
template <typename C, typename F>
RK_HD double sum_of(int64_t count, const F& f) {
  constexpr int64_t kSums = 64;
  C sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
#pragma omp simd
    for (int64_t j = 0; j < kSums; ++j) sums[j] += f(i + j);
  }
  for (int64_t j = 0; i + j < count; ++j) sums[j] += f(i + j);
  add_lanes<kSums / 2>(sums);
  return static_cast<double>(sums[0]);
}

template <typename C>
RK_HD C larger_of(C most, C value) {
  return value > most ? value : most;
}

// Of four parts at once: each has a chain of its own, and a vector costs little more than its
// instruction.
template <typename C, typename T>
RK_HD C largest(const T* x, int64_t count) {
  const int64_t part = count / 4;
  C a = kLowest<C>, b = a, c = a, d = a;
#pragma omp simd reduction(max : a, b, c, d)
  for (int64_t i = 0; i < part; ++i) {
    a = larger_of<C>(a, load(x[i]));
    b = larger_of<C>(b, load(x[part + i]));
    c = larger_of<C>(c, load(x[2 * part + i]));
    d = larger_of<C>(d, load(x[3 * part + i]));
  }
  for (int64_t i = 4 * part; i < count; ++i) a = larger_of<C>(a, load(x[i]));
  return larger_of(larger_of(a, b), larger_of(c, d));
}

// e[i] = exp((x[i] - max) / T), no x[i] being larger than max; `scale` is 1 / T. What is left of a
// vector is filled up to one: value by value, ten classes would take as long as a hundred.
template <typename C, typename T>
RK_HD void exponentials(const T* x, int64_t count, C max, C scale, C* e) {
  constexpr int64_t kVector = 16;
  const int64_t whole = count - count % kVector;
#pragma omp simd
  for (int64_t i = 0; i < whole; ++i) e[i] = exponential_below((load(x[i]) - max) * scale);
  if (whole == count) return;
  C last[kVector] = {};
  for (int64_t i = whole; i < count; ++i) last[i - whole] = (load(x[i]) - max) * scale;
#pragma omp simd
  for (int64_t j = 0; j < kVector; ++j) last[j] = exponential_below(last[j]);
  for (int64_t i = whole; i < count; ++i) e[i] = last[i - whole];
}

// What brings exponentials relative to one largest logit to those relative to a larger one: 1 at
// most places, where it need not be computed.
template <typename C>
RK_HD C factor_between(C from, C to, C scale = 1) {
  return from == to ? C(1) : exponential_below((from - to) * scale);
}

// What makes softmax of exponentials relative to `own`.
template <typename C>
RK_HD double softmax_factor(C own, const SoftmaxSum<C>& sum, C scale = 1) {
  const double factor = factor_between(own, sum.max, scale);
  return factor / sum.sum;
}

template <typename C>
RK_HD double sum_of_values(const C* e, int64_t count) {
  return sum_of<C>(count, [=](int64_t i) RK_INLINE { return e[i]; });
}

// Of some classes, relative to a largest logit: sum_c w_c (x_c - max), and sum_c w_c.
struct Above {
  double sum = 0, mass = 0;

  // `w` is null where all weights are 1.
  template <typename C, typename T>
  static RK_HD Above of(const T* x, const C* w, int64_t count, C max) {
    if (!w) {
      return {sum_of<C>(count, [=](int64_t i) RK_INLINE { return load(x[i]) - max; }),
              static_cast<double>(count)};
    }
    return {sum_of<C>(count, [=](int64_t i) RK_INLINE { return w[i] * (load(x[i]) - max); }),
            sum_of_values(w, count)};
  }

  // What is relative to `max` and a part relative to `own` become relative to `larger`.
  template <typename C>
  RK_HD void add(const Above& part, C max, C own, C larger) {
    if (mass != 0) sum += mass * (static_cast<double>(max) - larger);
    if (part.mass != 0) sum += part.mass * (static_cast<double>(own) - larger);
    sum += part.sum;
    mass += part.mass;
  }
};

// Asks for p[0, count) to be in the second-level cache when its turn comes, a row from now.
template <typename T>
RK_HD void prefetch_row(const T* p, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(p);
  const int64_t end = count * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < end; i += kLine) __builtin_prefetch(bytes + i, 0, 2);
}

// Elements from the line's start to element `offset` of an array of T that begins with one.
template <typename T>
RK_HD int64_t past_line(int64_t offset) {
  return offset % (kLine / static_cast<int64_t>(sizeof(T)));
}

// Calls f(first, count) for blocks of a row of `count` logits, the first of them `past` a line's
// start, such that all but the first begin where a line does: what is streamed are whole lines.
template <typename F>
RK_HD void for_blocks(int64_t past, int64_t count, const F& f) {
  int64_t n = kBlock - past;
  for (int64_t first = 0; first < count; first += n, n = kBlock) {
    if (n > count - first) n = count - first;
    f(first, n);
  }
}

// The block that for_blocks has a place of the row in.
RK_HD int64_t block_of(int64_t past, int64_t place) { return (place + past) / kBlock; }

// Blocks of a row at the most.
RK_HD int64_t most_blocks(int64_t count) { return count / kBlock + 2; }

RK_NAMESPACE_END
