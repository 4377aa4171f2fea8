"""What the losses of logits share: the softmax's sum, what labels make of it, and their tiles.

Shapes: logits [N, C, L] of M = N L positions; a tile of them has its classes along axis 1 - M_AXIS
(_channels.py). A value of each position is a vector [BLOCK_M], a value of each class a vector
[BLOCK_C]. To broadcast over a tile, the first is expanded at axis 1 - M_AXIS, the second at M_AXIS.

The loops are `while`, as in batch_norm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._channels import known_sizes, position_of, position_offsets, tile_at

LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)
LOWEST_DOUBLE = tl.constexpr(-1.7976931348623157e308)


# On values


@triton.jit
def bounded(largest):
    """At least the lowest finite value: -inf - -inf would be NaN where exp(-inf) is wanted."""
    lowest: tl.constexpr = LOWEST_DOUBLE if largest.dtype == tl.float64 else LOWEST_FLOAT
    return tl.maximum(largest, lowest)


@triton.jit
def number(value, COMPUTE: tl.constexpr):
    """A kernel's float64 argument, which the interpreter takes for float32."""
    return tl.full([], value, tl.float64).to(COMPUTE)


class Kind(NamedTuple):
    """The kind of target that a kernel is compiled for: one constexpr, KIND."""

    OF_LABELS: bool
    PAIR: bool
    SPREADS: bool  # whether every class counts for something
    LAM_PER_SAMPLE: bool


class Rule(NamedTuple):
    """How much smoothing leaves to the label, and how much it gives to each class."""

    hard: Any
    smooth: Any


class TargetPointers(NamedTuple):
    """A target as one argument of a kernel; what the target lacks is None."""

    target: Any  # int64 labels [M], or probabilities as x lies
    partner: Any  # int64 [M]
    lam: Any  # [N] or [1]; one_lam is used where it is None
    weight: Any  # [C]
    weight_sum: Any  # float64 [1]; where it is None, the sum is C
    totals: Any  # float64 [2] or [1], the divisors of the means over labels
    smoothing: Any  # float64 [1], used instead of the rule's two numbers


class Targets(NamedTuple):
    """A target with its numbers."""

    ptr: Any  # TargetPointers
    ignore_index: Any
    one_lam: Any
    rule: Any


class Positions(NamedTuple):
    """The positions of a program: m, from m0 on."""

    m0: Any
    m: Any
    sizes: Any


class Terms(NamedTuple):
    """The coefficients of positions' losses, [BLOCK_M] each; cross_entropy_math.h.

    v_c is what class c counts for: its weight, or where the target is probabilities, its weight
    times its probability. V is the sum of all v_c:
        loss = ka l(a) + kb l(b) + smooth sum_c v_c l(c),  l(c) = log sum - (x_c - max)
        d loss / d x_c = mass p_c - smooth v_c - [c = a] ka - [c = b] kb
    """

    a: Any  # labels; -1 for one that is ignored or absent
    b: Any
    weight_a: Any  # v_a, and v_b below
    weight_b: Any
    ka: Any
    kb: Any
    smooth: Any
    mass: Any  # ka + kb + smooth V
    least: Any  # the smallest share of a label that is not ignored


@triton.jit
def label_terms(a, b, weight_a, weight_b, share_a, share_b, rule, weight_sum):
    """The Terms of labels, from their weights and shares."""
    least = tl.minimum(tl.where(a >= 0, share_a, 1.0), tl.where(b >= 0, share_b, 1.0))
    share_a = tl.where(a >= 0, share_a, 0.0)
    share_b = tl.where(b >= 0, share_b, 0.0)
    ka = share_a * rule.hard * weight_a
    kb = share_b * rule.hard * weight_b
    smooth = (share_a + share_b) * rule.smooth
    mass = ka + kb + smooth * weight_sum
    return Terms(a, b, weight_a, weight_b, ka, kb, smooth, mass, least)


@triton.jit
def probability_terms(mass, share):
    """The Terms of class probabilities; `mass` is V."""
    zero = mass * 0.0
    none = zero.to(tl.int32) - 1
    return Terms(none, none, zero, zero, zero, zero, zero + share, share * mass, zero + 1.0)


@triton.jit
def target_loss(terms, total, above_a, above_b, z, mass, KIND: tl.constexpr):
    """The loss of positions. above_a and above_b are their labels' logits less the largest, `mass`
    is V, and z = sum_c v_c (x_c - max)."""
    log_total = tl.log(total)
    loss = total * 0.0
    if KIND.OF_LABELS:
        loss = tl.where(terms.a >= 0, terms.ka * (log_total - above_a), 0.0)
    if KIND.PAIR:
        loss += tl.where(terms.b >= 0, terms.kb * (log_total - above_b), 0.0)
    if KIND.SPREADS:
        of_all = mass * log_total - z
        loss += tl.where(terms.smooth != 0.0, terms.smooth * of_all, 0.0)
        # A share of 0 is multiplied all the same: 0 times an infinite loss is NaN.
        loss += tl.where(terms.least == 0.0, 0.0 * of_all, 0.0)
    return loss


@triton.jit
def tile_gradients(
    slope,  # softmax times mass
    v,
    terms,
    KIND: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The gradient with respect to the logits of a tile, as if no class were a label.

    store_label_gradients writes those of the labels afterwards. Comparing each class with its
    position's labels here would take half as many registers again.
    """
    if KIND.SPREADS:
        slope -= tl.expand_dims(terms.smooth, AXIS) * v
    if KIND.OF_LABELS:
        counts = terms.a >= 0
        if KIND.PAIR:
            counts = counts | (terms.b >= 0)
        slope = tl.where(tl.expand_dims(counts, AXIS), slope, 0.0)  # whatever its logits are
    return slope


@triton.jit
def label_gradients(slope, label, weight, terms, KIND: tl.constexpr):
    """The gradient with respect to the labels' logits, one a position."""
    if KIND.SPREADS:
        slope -= terms.smooth * weight
    slope -= tl.where(label == terms.a, terms.ka, 0.0)
    if KIND.PAIR:
        slope -= tl.where(label == terms.b, terms.kb, 0.0)
    return slope


# On memory


@triton.jit
def load_logits(ptr, at, inside, COMPUTE: tl.constexpr):
    """Logits; outside they are -inf, which adds nothing to a softmax."""
    return tl.load(ptr + at, mask=inside, other=float("-inf")).to(COMPUTE)


@triton.jit
def positions_of(C, M, L, TILES: tl.constexpr):
    sizes = known_sizes(C, M, L, TILES)
    m0 = position_of(tl.program_id(0), TILES)
    return Positions(m0, m0 + tl.arange(0, TILES.BLOCK_M), sizes)


@triton.jit
def load_rule(hard, smooth, smoothing_ptr, C, COMPUTE: tl.constexpr):
    """The Rule from the arguments, or from a smoothing in memory."""
    if smoothing_ptr is None:
        rule = Rule(number(hard, COMPUTE), number(smooth, COMPUTE))
    else:
        smoothing = tl.load(smoothing_ptr)
        rule = Rule((1.0 - smoothing).to(COMPUTE), (smoothing / C).to(COMPUTE))
    return rule


@triton.jit
def load_label(labels_ptr, weight_ptr, m, C, M, ignore_index, COMPUTE: tl.constexpr):
    """(labels, their weights) of positions m; (-1, 0) where a label does not count."""
    label = tl.load(labels_ptr + m, mask=m < M, other=ignore_index)
    counts = label != ignore_index
    valid = (label >= 0) & (label < C)
    tl.device_assert(valid | (counts == 0), "a label is neither in [0, C) nor ignore_index")
    counts = counts & valid
    if weight_ptr is None:
        weight = tl.where(counts, 1.0, 0.0).to(COMPUTE)
    else:
        weight = tl.load(weight_ptr + label, mask=counts, other=0.0)
    return tl.where(counts, label, -1).to(tl.int32), weight


@triton.jit
def load_total(totals_ptr, number: tl.constexpr, COMPUTE: tl.constexpr):
    """The divisor of the mean over labels, or over partner labels; 1 without a mean."""
    if totals_ptr is None:
        total = tl.full([], 1.0, COMPUTE)
    else:
        total = tl.load(totals_ptr + number).to(COMPUTE)
    return total


@triton.jit
def load_label_terms(
    targets,
    factor,  # what all shares are multiplied by, [BLOCK_M] or one number
    weight_sum,
    positions,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The Terms of positions whose targets are labels."""
    ptr, ignore_index = targets.ptr, targets.ignore_index
    m, C, M = positions.m, positions.sizes.C, positions.sizes.M
    if ptr.target is None:
        a, weight_a = m.to(tl.int32) * 0 - 1, tl.zeros([m.shape[0]], COMPUTE)
    else:
        a, weight_a = load_label(ptr.target, ptr.weight, m, C, M, ignore_index, COMPUTE)
    share_a = factor / load_total(ptr.totals, 0, COMPUTE)
    b, weight_b, share_b = a * 0 - 1, weight_a * 0.0, weight_a * 0.0
    if KIND.PAIR:
        b, weight_b = load_label(ptr.partner, ptr.weight, m, C, M, ignore_index, COMPUTE)
        if ptr.lam is None:
            lam = tl.full([], targets.one_lam, tl.float64)
        elif KIND.LAM_PER_SAMPLE:
            lam = tl.load(ptr.lam + m // positions.sizes.L, mask=m < M, other=0.0).to(tl.float64)
        else:
            lam = tl.load(ptr.lam).to(tl.float64)
        share_b = factor / load_total(ptr.totals, 1, COMPUTE)
        share_a *= lam.to(COMPUTE)
        share_b *= (1.0 - lam).to(COMPUTE)
    return label_terms(a, b, weight_a, weight_b, share_a, share_b, targets.rule, weight_sum)


@triton.jit
def labels_at(label, positions, TILES: tl.constexpr):
    """Where the logits of labels lie, one a position."""
    at = label.to(tl.int64)
    if TILES.M_AXIS == 1:
        at *= positions.sizes.L
    return at + position_offsets(positions.m0, positions.sizes, 1, TILES.BLOCK_M, TILES)


@triton.jit
def load_above(ptr, at, label, largest):
    """Logits of labels, less the largest of their positions; 0 where there is no label."""
    x = tl.load(ptr + at, mask=label >= 0, other=0.0).to(largest.dtype)
    return tl.where(label >= 0, x - largest, 0.0)


@triton.jit
def load_counts(targets, at, c0, inside, sizes, KIND: tl.constexpr, TILES: tl.constexpr):
    """v of Terms, for the tile that begins at class c0; 0 outside."""
    ptr, rule = targets.ptr, targets.rule
    COMPUTE: tl.constexpr = rule.hard.dtype
    if KIND.OF_LABELS:
        v = tl.where(inside, 1.0, 0.0).to(COMPUTE)
    else:
        v = tl.load(ptr.target + at, mask=inside, other=0.0).to(COMPUTE)
        v = tl.where(inside, v * rule.hard + rule.smooth, 0.0)
    if ptr.weight is not None:
        c = c0 + tl.arange(0, TILES.BLOCK_C)
        weight = tl.load(ptr.weight + c, mask=c < sizes.C, other=0.0)
        v *= tl.expand_dims(weight, TILES.M_AXIS)
    return v


@triton.jit
def load_factor(grad_output_ptr, m, M, PER_POSITION: tl.constexpr, COMPUTE: tl.constexpr):
    """grad_output of each position m, or the one number for all."""
    if PER_POSITION:
        factor = tl.load(grad_output_ptr + m, mask=m < M, other=0.0).to(COMPUTE)
    else:
        factor = tl.load(grad_output_ptr).to(COMPUTE)
    return factor


@triton.jit
def load_weight_sum(weight_sum_ptr, C, COMPUTE: tl.constexpr):
    """V of Terms, where the targets are labels."""
    if weight_sum_ptr is None:
        weight_sum = tl.full([], C, COMPUTE)
    else:
        weight_sum = tl.load(weight_sum_ptr).to(COMPUTE)
    return weight_sum


@triton.jit
def store_loss(ptr, loss, totals_ptr, m, M, KIND: tl.constexpr, SUMS: tl.constexpr):
    """The losses of positions, or their program's sum in float64."""
    if SUMS:
        loss = tl.sum(tl.where(m < M, loss, 0.0).to(tl.float64), 0)
        if totals_ptr is not None:
            # Where all labels are ignored a mean is 0 / 0, although the positions only gave zeros.
            loss += 0.0 / load_total(totals_ptr, 0, tl.float64)
            if KIND.PAIR:
                loss += 0.0 / load_total(totals_ptr, 1, tl.float64)
        tl.store(ptr + tl.program_id(0), loss)
    else:
        tl.store(ptr + m, loss, mask=m < M)


@triton.jit
def load_loss(
    x_ptr, terms, largest, total, z, mass, positions, KIND: tl.constexpr, TILES: tl.constexpr
):
    """target_loss, with the labels' logits loaded from memory."""
    above_a, above_b = 0.0, 0.0
    if KIND.OF_LABELS:
        above_a = load_above(x_ptr, labels_at(terms.a, positions, TILES), terms.a, largest)
    if KIND.PAIR:
        above_b = load_above(x_ptr, labels_at(terms.b, positions, TILES), terms.b, largest)
    return target_loss(terms, total, above_a, above_b, z, mass, KIND)


# Gradients


class Stats(NamedTuple):
    """What the forward stores of each position: [2, M], or with a teacher [5, M]."""

    largest: Any
    total: Any
    softened: Any = 1.0  # the totals at T
    largest_t: Any = 0.0
    total_t: Any = 1.0


class Slopes(NamedTuple):
    """What the gradients are computed from; the factors are [BLOCK_M] each."""

    x_ptr: Any
    teacher_ptr: Any  # or None: then there is nothing at T
    gradient_ptr: Any
    stats: Any
    hard: Any  # factor of the student's exponentials: mass over their sum
    soft: Any  # factor of the student's exponentials at T
    soft_t: Any  # factor of the teacher's at T
    inverse_t: Any


@triton.jit
def store_label_gradient(
    slopes, label, weight, terms, positions, KIND: tl.constexpr, TILES: tl.constexpr
):
    """Writes the gradients of the labels' logits over what lies there."""
    at = labels_at(label, positions, TILES)
    x = load_above(slopes.x_ptr, at, label, slopes.stats.largest)
    gradient = label_gradients(tl.exp(x) * slopes.hard, label, weight, terms, KIND)
    if slopes.teacher_ptr is not None:
        t = load_above(slopes.teacher_ptr, at, label, slopes.stats.largest_t)
        soft, soft_t = tl.exp(x * slopes.inverse_t), tl.exp(t * slopes.inverse_t)
        gradient += soft * slopes.soft - soft_t * slopes.soft_t
    ptr = slopes.gradient_ptr
    tl.store(ptr + at, gradient.to(ptr.dtype.element_ty), mask=label >= 0)


@triton.jit
def store_label_gradients(slopes, terms, positions, KIND: tl.constexpr, TILES: tl.constexpr):
    """The same for both labels of a position. If they are equal, both write the same value."""
    tl.debug_barrier()  # other threads may have stored the tile there
    store_label_gradient(slopes, terms.a, terms.weight_a, terms, positions, KIND, TILES)
    if KIND.PAIR:
        store_label_gradient(slopes, terms.b, terms.weight_b, terms, positions, KIND, TILES)


@triton.jit
def soft_gradients(soft, soft_t, slopes, AXIS: tl.constexpr):
    """The divergence's gradient with respect to a tile's logits, from its exponentials at T."""
    scale, scale_t = tl.expand_dims(slopes.soft, AXIS), tl.expand_dims(slopes.soft_t, AXIS)
    return soft * scale - soft_t * scale_t


@triton.jit
def store_gradients(slopes, targets, terms, positions, KIND: tl.constexpr, TILES: tl.constexpr):
    """Writes the gradients of all logits, tile by tile from the last."""
    COMPUTE: tl.constexpr = slopes.stats.largest.dtype
    AXIS: tl.constexpr = 1 - TILES.M_AXIS
    ptr, sizes = slopes.gradient_ptr, positions.sizes
    tile = tl.cdiv(sizes.C, TILES.BLOCK_C)
    while tile > 0:
        tile -= 1
        c0 = tile * TILES.BLOCK_C
        at, inside = tile_at(positions.m0, c0, sizes, TILES)
        x = load_logits(slopes.x_ptr, at, inside, COMPUTE)
        x -= tl.expand_dims(slopes.stats.largest, AXIS)
        if slopes.teacher_ptr is not None:
            t = load_logits(slopes.teacher_ptr, at, inside, COMPUTE)
            t -= tl.expand_dims(slopes.stats.largest_t, AXIS)
        v = 0.0
        if KIND.SPREADS:
            v = load_counts(targets, at, c0, inside, sizes, KIND, TILES)
        slope = tl.exp(x) * tl.expand_dims(slopes.hard, AXIS)
        gradient = tile_gradients(slope, v, terms, KIND, AXIS)
        if slopes.teacher_ptr is not None:
            soft, soft_t = tl.exp(x * slopes.inverse_t), tl.exp(t * slopes.inverse_t)
            gradient += soft_gradients(soft, soft_t, slopes, AXIS)
        tl.store(ptr + at, gradient.to(ptr.dtype.element_ty), mask=inside)
    if KIND.OF_LABELS:
        store_label_gradients(slopes, terms, positions, KIND, TILES)


# Sums of labels


@triton.jit(do_not_specialize=["ignore_index"])  # no recompiling by value
def label_totals_kernel(
    labels_ptr,  # int64 [M]
    partner_ptr,  # likewise, or None
    weight_ptr,  # [C], or None
    totals_ptr,  # float64 [2, programs], or [1, programs]
    C,
    M,
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    sums = tl.zeros([BLOCK], tl.float64)
    partner_sums = tl.zeros([BLOCK], tl.float64)
    block = program
    while block.to(tl.int64) * BLOCK < M:
        m = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        sums += load_label(labels_ptr, weight_ptr, m, C, M, ignore_index, tl.float64)[1]
        if partner_ptr is not None:
            weights = load_label(partner_ptr, weight_ptr, m, C, M, ignore_index, tl.float64)[1]
            partner_sums += weights
        block += programs
    tl.store(totals_ptr + program, tl.sum(sums, 0))
    if partner_ptr is not None:
        tl.store(totals_ptr + programs + program, tl.sum(partner_sums, 0))
