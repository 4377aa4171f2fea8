"""Count, mean and sum of squared deviations of tiles, merged by Chan's formula, on values.

T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979. Means are kept as totals: where one is infinite it stays so, while a merge of
means would make it Inf - Inf. AXIS is the one that a channel's values lie along.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pivot_of(x, count, AXIS: tl.constexpr):
    """About the mean of `count` values, x being 0 elsewhere: what to take off before anything else.

    Differences from it are exact where the deviation is small beside the mean, and their totals
    small. A value that is not finite has no use as a pivot; 0 is one.
    """
    pivot = tl.sum(x, AXIS) * (1.0 / count.to(x.dtype))
    return tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)


@triton.jit
def tile_moments(x, inside, count, AXIS: tl.constexpr):
    """(total, m2) of the `count` values inside, in two passes over the tile; x is 0 elsewhere."""
    total = tl.sum(x, AXIS)
    mean = total * (1.0 / count.to(x.dtype))
    deviation = tl.where(inside, x - tl.expand_dims(mean, AXIS), 0.0)
    return total, tl.sum(deviation * deviation, AXIS)


@triton.jit
def merged_m2(count_a, total_a, m2_a, count_b, total_b, m2_b):
    """m2 of both sets together; a may be empty."""
    a, b = tl.maximum(count_a, 1).to(m2_a.dtype), count_b.to(m2_a.dtype)
    delta = tl.where(count_a > 0, total_b * (1.0 / b) - total_a * (1.0 / a), 0.0)
    return m2_a + m2_b + delta * delta * (a * (b / (a + b)))


@triton.jit
def merge_all(count, mean, m2, share, AXIS: tl.constexpr):
    """(mean, m2) of all sets along AXIS, `share` being 1 over all their values.

    A set that is none has count, mean and m2 0.
    """
    merged = tl.sum(count * mean, AXIS) * share
    delta = tl.where(count > 0, mean - tl.expand_dims(merged, AXIS), 0.0)
    return merged, tl.sum(m2 + count * delta * delta, AXIS)
