// Count, mean and sum of squared deviations of a set of values, merged pairwise.
//
// T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances", 1979. No difference of large sums is ever taken: a mean of 1e4 with a deviation of
// 1e-2 keeps its variance.
#pragma once

#include <cstdint>

#include "portable.h"

RK_NAMESPACE_BEGIN

// C is the type that the merge computes in; a count of 0 is the neutral element. Counts that come
// from elsewhere may be of C themselves, since they may be no integers at all.
template <typename C, typename Count = int64_t>
struct Moments {
  Count count;
  C mean;
  C m2;  // sum of (x - mean)^2

  RK_HD void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const C share = C(other.count) / C(count + other.count);
    const C delta = other.mean - mean;
    // An infinite mean stays so, as in a sum; one step towards it would make it NaN.
    mean = delta - delta == C(0) ? mean + delta * share : mean + other.mean;
    // An infinite value leaves no variance: infinity less itself is NaN.
    m2 += other.m2 + delta * delta * (share * C(count)) + (delta - delta);
    count += other.count;
  }
};

RK_NAMESPACE_END
