"""The step of AdamW, Adam, SGDW and SGD on a table of tensors in Triton.

AdamW reads p, g, m, v and writes p, m, v: 3 * sizeof(T) + 4 * sizeof(S) bytes an element with
moments of type S (28 B in fp32, 14 B in bf16, 22 B in bf16 with fp32 moments); SGDW with momentum
five arrays, without three; amsgrad, an EMA and Kahan's compensation two more each. Of what has no
gradient an EMA alone reads p and itself and writes itself.

One launch for the whole table, a program for each chunk. Which arrays there are only the table
knows, on the device: accesses to one that is not there are masked off or branched around, and move
nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rng import TAG_ROUNDING
from ._launch import device_of, state_arguments
from ._random import half_words, load_state
from ._table import (
    COMPENSATION,
    ELEMENT_OFFSET,
    EMA,
    FIRST_MOMENT,
    GRAD,
    GROUP,
    MAX_SECOND_MOMENT,
    PARAM,
    SECOND_MOMENT,
    STEP,
    address_at,
    chunk_at,
    chunks_of,
    is_last_program,
    pointer_to,
    row_at,
    type_name,
    vectored_elements,
)

# Numbered as in csrc/include/reg_kernels/optimizer_step_math.h.
ADAM, AVERAGE = tl.constexpr(0), tl.constexpr(2)
DECOUPLED_LR, L2 = tl.constexpr(1), tl.constexpr(2)
STOCHASTIC, KAHAN = tl.constexpr(1), tl.constexpr(2)
# Flags of a group, above the two bits of its decay.
MAXIMIZE, NESTEROV, RATE_ON_DEVICE = tl.constexpr(4), tl.constexpr(8), tl.constexpr(16)

NUMBERS = 8  # of a group; its flags are one more
WORDS = tl.constexpr(NUMBERS + 1)
REST = 256  # elements at a time of what cannot be moved in vectors
STEPS = 256  # that the last program adds to at a time
# No recompiling by value, nor by the alignment of single numbers.
UNSPECIALISED = [
    *("count", "chunks", "flags", "squares_count", "seed", "offset", "groups_ptr", "rates_ptr"),
    *("squares_ptr", "grad_scale_ptr", "found_inf_ptr", "state_ptr", "number"),
]


class Group(NamedTuple):
    """A group's hyperparameters, float64 but for the flags; SGD's momentum and dampening are the
    betas."""

    lr: Any
    decay_lr: Any
    weight_decay: Any
    l1: Any
    beta1: Any
    beta2: Any
    eps: Any
    ema_decay: Any
    flags: Any


class Rule(NamedTuple):
    """What a tensor's elements are updated with, in the type that they are computed in:
    OptimizerRule of optimizer_step_math.h."""

    gradient: Any
    l2: Any
    keep: Any
    threshold: Any
    momentum: Any
    momentum_rest: Any
    beta2: Any
    beta2_rest: Any
    bias2: Any
    eps: Any
    step_size: Any
    ema_rest: Any
    coupled: Any  # booleans from here on
    from_gradient: Any
    nesterov: Any


class Arrays(NamedTuple):
    """Where a chunk begins in each array of its tensor, 0 where there is none."""

    param: Any
    grad: Any
    first_moment: Any
    second_moment: Any
    max_second_moment: Any
    ema: Any
    compensation: Any


class Draws(NamedTuple):
    """Of a chunk: the stream's key and offset, and the first of the chunk's groups."""

    key: Any
    offset: Any
    first: Any


# On single numbers, in float64


@triton.jit
def power(base, exponent):
    """base^exponent for an integer from 0 on, by squaring; 1 - base^exponent is as exact as
    1 - base is."""
    result = tl.full([], 1.0, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def clip_factor(norm, max_norm):
    """The factor of a gradient whose global norm is `norm`: torch's clip_grad_norm_."""
    factor = max_norm / (norm + 1e-6)
    # NaN stays NaN.
    return tl.where(factor >= 1.0, 1.0, factor)


@triton.jit
def gradient_factor(squares_ptr, squares_count, max_norm, grad_scale_ptr):
    """What the gradients are multiplied by: 1 / grad_scale and what clips them."""
    factor = tl.full([], 1.0, tl.float64)
    if grad_scale_ptr is not None:
        factor = factor / tl.load(grad_scale_ptr).to(tl.float64)
    if squares_ptr is not None:
        total = tl.full([], 0.0, tl.float64)
        slot = 0
        while slot < squares_count:
            total += tl.load(squares_ptr + slot)
            slot += 1
        factor = factor * clip_factor(tl.sqrt(total) * factor, max_norm)
    return factor


@triton.jit
def step_rule(group, step, factor, ALGORITHM: tl.constexpr, COMPUTE: tl.constexpr):
    """optimizer_constants of optimizer_step_math.h and what OptimizerRule makes of them. `step`
    counts this update, from 1 on; `factor` is what scaling and clipping multiply by."""
    decay = group.flags % 4
    # What of the decays is in force: decoupled_lr follows the schedule of lr, not lr itself.
    rate = tl.where(decay == DECOUPLED_LR, group.lr / group.decay_lr, group.lr)
    l2 = tl.where(decay == L2, group.weight_decay, 0.0)
    keep = tl.where(decay == L2, 1.0, 1.0 - rate * group.weight_decay)
    bias2, step_size = group.lr, group.lr
    if ALGORITHM == ADAM:
        bias2 = tl.sqrt(1.0 - power(group.beta2, step))
        step_size = group.lr / (1.0 - power(group.beta1, step))
        from_gradient = 1.0 - group.beta1 >= 0.5
        momentum_rest = (1.0 - group.beta1).to(COMPUTE)
        # torch.lerp's two forms, each exact at its end: m + w (g - m), g + (w - 1) (g - m).
        momentum_rest = tl.where(from_gradient, momentum_rest - 1.0, momentum_rest)
    else:
        from_gradient = step == 1
        momentum_rest = (1.0 - group.beta2).to(COMPUTE)
    return Rule(
        tl.where(group.flags & MAXIMIZE != 0, -factor, factor).to(COMPUTE),
        l2.to(COMPUTE),
        keep.to(COMPUTE),
        (rate * group.l1).to(COMPUTE),
        group.beta1.to(COMPUTE),
        momentum_rest,
        group.beta2.to(COMPUTE),
        (1.0 - group.beta2).to(COMPUTE),
        bias2.to(COMPUTE),
        group.eps.to(COMPUTE),
        step_size.to(COMPUTE),
        (1.0 - group.ema_decay).to(COMPUTE),
        l2 != 0.0,
        from_gradient,
        group.flags & NESTEROV != 0,
    )


# On elements, in the type that they are computed in


@triton.jit
def multiply_add(a, b, c):
    """a b + c, rounded once, where one of a and b may be a single number."""
    return tl.fma(a + tl.zeros_like(c), b + tl.zeros_like(c), c)


@triton.jit
def square_root(x):
    """Rounded to nearest, and of what is subnormal too: of float32, tl.sqrt does neither."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(a, b):
    """Rounded to nearest, as `/` is not in float32."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def regularised_gradient(rule, g, p):
    """The gradient that the moments take; apart, since 0 p is not 0 where p is infinite."""
    g = g * rule.gradient
    return tl.where(rule.coupled, multiply_add(p, rule.l2, g), g)


@triton.jit
def adam_moments(rule, g, m, v):
    """(m, v) after the step, of the regularised gradient."""
    m = multiply_add(g - m, rule.momentum_rest, tl.where(rule.from_gradient, g, m))
    return m, multiply_add(rule.beta2_rest * g, g, v * rule.beta2)


@triton.jit
def larger_moment(v, v_max):
    """amsgrad's: the maximum so far. NaN wins, as in torch.maximum."""
    return tl.where((v <= v_max) | (v_max != v_max), v_max, v)


@triton.jit
def adam_values(rule, p, m, v):
    """The parameter after the step, by the moments after it."""
    denominator = quotient(square_root(v), rule.bias2 + tl.zeros_like(v)) + rule.eps
    return p * rule.keep - quotient(rule.step_size * m, denominator)


@triton.jit
def sgd_momentum(rule, g, m):
    """(direction, m) after the step, of the regularised gradient."""
    moved = multiply_add(g, rule.momentum_rest, m * rule.momentum)
    m = tl.where(rule.from_gradient, g, moved)
    return tl.where(rule.nesterov, multiply_add(m, rule.momentum, g), m), m


@triton.jit
def sgd_values(rule, p, direction):
    """The parameter after the step."""
    return multiply_add(direction, -rule.step_size, p * rule.keep)


@triton.jit
def soft_threshold(p, t):
    """argmin_x (x - p)^2 / 2 + t |x|: what lies within t of zero becomes zero, exactly."""
    return tl.where((p >= -t) & (p <= t), 0.0, tl.where(p > 0.0, p - t, p + t))


@triton.jit
def ema_values(rule, ema, p):
    return multiply_add(p - ema, rule.ema_rest, ema)


@triton.jit
def stochastic_bfloat16(p, half_word):
    """float32 as one of the two bfloat16 beside it; store_stochastic of optimizer_step_math.h.

    By its bits from end to end, so that no conversion rounds again. An infinity's low bits are zero
    and carry nothing; a NaN becomes the quiet one.
    """
    rounded = (p.to(tl.uint32, bitcast=True) + half_word.to(tl.uint32)) >> 16
    rounded = tl.where(p != p, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


# On memory


@triton.jit
def update_block(
    arrays,
    rule,
    draws,
    first,  # element of the chunk
    block,
    count,  # elements from `first` on
    ALGORITHM: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps one block of a chunk."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    i = first + at
    p_ptr = pointer_to(arrays.param, T, ALIGNED) + i
    g_ptr = pointer_to(arrays.grad, T, ALIGNED) + i
    m_ptr = pointer_to(arrays.first_moment, S, ALIGNED) + i

    p = tl.load(p_ptr, mask=inside, other=0.0).to(COMPUTE)
    g = tl.load(g_ptr, mask=inside, other=0.0).to(COMPUTE)
    if ALGORITHM == ADAM:
        m = tl.load(m_ptr, mask=inside, other=0.0).to(COMPUTE)
    if ROUNDING == KAHAN:
        # What rounding took off the parameter so far is still part of it.
        lost_ptr = pointer_to(arrays.compensation, T, ALIGNED) + i
        has_lost = inside & (arrays.compensation != 0)
        p += tl.load(lost_ptr, mask=has_lost, other=0.0).to(COMPUTE)
    # What may not be there is branched around. Masks would take a quarter more registers.
    if ALGORITHM == ADAM:
        v_ptr = pointer_to(arrays.second_moment, S, ALIGNED) + i
        v = tl.load(v_ptr, mask=inside, other=0.0).to(COMPUTE)
        m, v = adam_moments(rule, regularised_gradient(rule, g, p), m, v)
        tl.store(v_ptr, v.to(S), mask=inside)
        if arrays.max_second_moment != 0:
            v_max_ptr = pointer_to(arrays.max_second_moment, S, ALIGNED) + i
            v = larger_moment(v, tl.load(v_max_ptr, mask=inside, other=0.0).to(COMPUTE))
            tl.store(v_max_ptr, v.to(S), mask=inside)
        p = adam_values(rule, p, m, v)
        tl.store(m_ptr, m.to(S), mask=inside)
    elif arrays.first_moment != 0:
        m = tl.load(m_ptr, mask=inside, other=0.0).to(COMPUTE)
        direction, m = sgd_momentum(rule, regularised_gradient(rule, g, p), m)
        tl.store(m_ptr, m.to(S), mask=inside)
        p = sgd_values(rule, p, direction)
    else:
        p = sgd_values(rule, p, regularised_gradient(rule, g, p))
    p = tl.where(rule.threshold > 0.0, soft_threshold(p, rule.threshold), p)
    if arrays.ema != 0:
        ema_ptr = pointer_to(arrays.ema, COMPUTE, ALIGNED) + i
        ema = tl.load(ema_ptr, mask=inside, other=0.0)
        tl.store(ema_ptr, ema_values(rule, ema, p), mask=inside)
    if ROUNDING == STOCHASTIC:
        first_group = draws.first + (first + block * BLOCK) // 8
        drawn = half_words(draws.key, draws.offset, first_group, BLOCK // 8)
        stored = stochastic_bfloat16(p, drawn)
    else:
        stored = p.to(T)
    tl.store(p_ptr, stored, mask=inside)
    if ROUNDING == KAHAN:
        lost = p - stored.to(COMPUTE)
        lost = tl.where(lost - lost == 0.0, lost, 0.0)  # an infinity stays one
        tl.store(lost_ptr, lost.to(T), mask=has_lost)


@triton.jit
def average_block(
    arrays,
    rule,
    first,  # element of the chunk
    block,
    count,  # elements from `first` on
    T: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes the average of one block of a chunk on, and leaves the parameter as it is."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = (at < count) & (arrays.ema != 0)
    p_ptr = pointer_to(arrays.param, T, ALIGNED) + first + at
    ema_ptr = pointer_to(arrays.ema, COMPUTE, ALIGNED) + first + at
    p = tl.load(p_ptr, mask=inside, other=0.0).to(COMPUTE)
    ema = tl.load(ema_ptr, mask=inside, other=0.0)
    tl.store(ema_ptr, ema_values(rule, ema, p), mask=inside)


@triton.jit
def group_of(lr, decay_lr, weight_decay, l1, beta1, beta2, eps, ema_decay, flags):
    """Of a kernel's arguments, which the interpreter takes for float32."""
    return Group(
        tl.full([], lr, tl.float64),
        tl.full([], decay_lr, tl.float64),
        tl.full([], weight_decay, tl.float64),
        tl.full([], l1, tl.float64),
        tl.full([], beta1, tl.float64),
        tl.full([], beta2, tl.float64),
        tl.full([], eps, tl.float64),
        tl.full([], ema_decay, tl.float64),
        flags,
    )


@triton.jit
def load_group(groups_ptr, number):
    row_ptr = groups_ptr + number * WORDS
    return Group(
        tl.load(row_ptr),
        tl.load(row_ptr + 1),
        tl.load(row_ptr + 2),
        tl.load(row_ptr + 3),
        tl.load(row_ptr + 4),
        tl.load(row_ptr + 5),
        tl.load(row_ptr + 6),
        tl.load(row_ptr + 7),
        tl.load(row_ptr + 8).to(tl.int32),
    )


@triton.jit
def store_group(groups_ptr, number, group):
    row_ptr = groups_ptr + number * WORDS
    tl.store(row_ptr, group.lr)
    tl.store(row_ptr + 1, group.decay_lr)
    tl.store(row_ptr + 2, group.weight_decay)
    tl.store(row_ptr + 3, group.l1)
    tl.store(row_ptr + 4, group.beta1)
    tl.store(row_ptr + 5, group.beta2)
    tl.store(row_ptr + 6, group.eps)
    tl.store(row_ptr + 7, group.ema_decay)
    tl.store(row_ptr + 8, group.flags)


@triton.jit
def load_arrays(
    table_ptr, count, tensor, first, T: tl.constexpr, S: tl.constexpr, COMPUTE: tl.constexpr
):
    return Arrays(
        address_at(table_ptr, PARAM, count, tensor, first, T),
        address_at(table_ptr, GRAD, count, tensor, first, T),
        address_at(table_ptr, FIRST_MOMENT, count, tensor, first, S),
        address_at(table_ptr, SECOND_MOMENT, count, tensor, first, S),
        address_at(table_ptr, MAX_SECOND_MOMENT, count, tensor, first, S),
        address_at(table_ptr, EMA, count, tensor, first, COMPUTE),
        address_at(table_ptr, COMPENSATION, count, tensor, first, T),
    )


@triton.jit
def step_pointer(address):
    return address.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def add_steps(table_ptr, count, STEPS: tl.constexpr):
    """Adds one to each tensor's step."""
    at = 0
    while at < count:
        i = at + tl.arange(0, STEPS)
        address = tl.load(table_ptr + STEP * count + i, mask=i < count, other=0)
        step = tl.load(step_pointer(address), mask=address != 0, other=0.0)
        tl.store(step_pointer(address), step + 1.0, mask=address != 0)
        at += STEPS


@triton.jit
def step_chunk(
    table_ptr,
    count,
    the_group,
    groups_ptr,
    rates_ptr,
    factor,
    state_ptr,
    seed,
    offset,
    ALGORITHM: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    ROUNDING: tl.constexpr,
    TAG: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Steps the program's chunk."""
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == T else tl.float32
    tensor, first, rest = chunk_at(table_ptr, count, tl.program_id(0))
    group = the_group
    if groups_ptr is not None:
        group = load_group(groups_ptr, row_at(table_ptr, GROUP, count, tensor))
    if rates_ptr is not None:
        on_device = group.flags & RATE_ON_DEVICE != 0
        rate = tl.load(rates_ptr + group.lr.to(tl.int32), mask=on_device, other=0.0)
        group = Group(tl.where(on_device, rate.to(tl.float64), group.lr), *group[1:])
    address = row_at(table_ptr, STEP, count, tensor)
    step = tl.load(step_pointer(address), mask=address != 0, other=0.0) + 1.0
    rule = step_rule(group, step.to(tl.int64), factor, ALGORITHM, COMPUTE)
    arrays = load_arrays(table_ptr, count, tensor, first, T, S, COMPUTE)
    draws = Draws(0, 0, 0)
    if ROUNDING == STOCHASTIC:
        seed, offset = load_state(state_ptr, seed, offset)
        drawn = row_at(table_ptr, ELEMENT_OFFSET, count, tensor) + first
        draws = Draws(seed ^ TAG, offset, drawn // 8)

    addresses = arrays.param | arrays.grad | arrays.first_moment | arrays.second_moment
    addresses = addresses | arrays.max_second_moment | arrays.ema | arrays.compensation
    vectored = vectored_elements(rest, addresses)
    # What is left comes first: the loop over vectors, which needs many registers, is then the last.
    block = 0
    while block * REST < rest - vectored:
        if ALGORITHM == AVERAGE:
            average_block(
                *(arrays, rule, vectored, block, rest - vectored), *(T, COMPUTE, False, REST)
            )
        else:
            update_block(
                *(arrays, rule, draws, vectored, block, rest - vectored),
                *(ALGORITHM, T, S, COMPUTE, ROUNDING, False, REST),
            )
        block += 1
    block = 0
    while block * BLOCK < vectored:
        if ALGORITHM == AVERAGE:
            average_block(*(arrays, rule, 0, block, vectored), *(T, COMPUTE, True, BLOCK))
        else:
            update_block(
                *(arrays, rule, draws, 0, block, vectored),
                *(ALGORITHM, T, S, COMPUTE, ROUNDING, True, BLOCK),
            )
        block += 1


@triton.jit(do_not_specialize=UNSPECIALISED)
def optimizer_step_kernel(
    table_ptr,
    count,
    chunks,
    lr: tl.float64,
    decay_lr: tl.float64,
    weight_decay: tl.float64,
    l1: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    ema_decay: tl.float64,
    flags,
    groups_ptr,  # float64 [groups, 9], or None: then all are of the group that stands above
    rates_ptr,  # float32: the lr of groups that have RATE_ON_DEVICE set is a place here; or None
    squares_ptr,  # float64 [squares_count], or None
    squares_count,
    max_norm: tl.float64,
    grad_scale_ptr,  # float32 [1], or None
    found_inf_ptr,  # likewise
    state_ptr,
    seed: tl.int64,
    offset: tl.int64,
    scratch_ptr,
    ALGORITHM: tl.constexpr,
    DTYPE: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROUNDING: tl.constexpr,
    TAG: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STEPS: tl.constexpr,
):
    T: tl.constexpr = tl.dtype(DTYPE)
    S: tl.constexpr = tl.dtype(MOMENTS)
    proceeds = True
    if found_inf_ptr is not None:
        proceeds = tl.load(found_inf_ptr) == 0.0  # else no program takes a ticket
    if proceeds:
        if tl.program_id(0) < chunks:
            the_group = group_of(
                *(lr, decay_lr, weight_decay, l1, beta1, beta2, eps, ema_decay, flags)
            )
            factor = gradient_factor(squares_ptr, squares_count, max_norm, grad_scale_ptr)
            step_chunk(
                *(table_ptr, count, the_group, groups_ptr, rates_ptr, factor),
                *(state_ptr, seed, offset),
                *(ALGORITHM, T, S, ROUNDING, TAG, BLOCK, REST),
            )
        if is_last_program(scratch_ptr):
            add_steps(table_ptr, count, STEPS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def write_group_kernel(
    groups_ptr,  # float64 [groups, 9], a row of which is written
    number,
    lr: tl.float64,
    decay_lr: tl.float64,
    weight_decay: tl.float64,
    l1: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    ema_decay: tl.float64,
    flags,
):
    group = group_of(lr, decay_lr, weight_decay, l1, beta1, beta2, eps, ema_decay, flags)
    store_group(groups_ptr, number, group)


def _block(algorithm: int, dtype: str, moments: str, rounding: int) -> int:
    """Elements at a time, such that nothing spills: tests/triton/test_optimizer_step.py.

    Adam takes 54 to 79 registers a thread and SGD 45 to 61, in float64 up to 104: three programs of
    256 threads and more on a multiprocessor, two in float64.
    """
    if dtype == "fp64":
        return 1024 if algorithm == ADAM.value else 2048
    narrow = algorithm == ADAM.value and "fp32" not in (dtype, moments)
    return 2048 if narrow and rounding != KAHAN.value else 1024


def _group_rows(numbers: list[float], flags: list[int]) -> list[list[float]]:
    """The numbers of each group; an lr that is on the device is its place among `rates`."""
    rows, rates = [], 0
    for i, word in enumerate(flags):
        row = list(numbers[NUMBERS * i : NUMBERS * (i + 1)])
        if word & RATE_ON_DEVICE.value:
            row[0] = float(rates)
            rates += 1
        rows.append(row)
    return rows


def _on_device(
    rows: list[list[float]], flags: list[int], device: torch.device, capturing: bool
) -> Tensor:
    """The groups as float64 [groups, 9]."""
    if not capturing:
        table = [[*row, float(word)] for row, word in zip(rows, flags, strict=True)]
        # From memory that is not pinned: the driver has taken it when this returns, and waits for
        # nothing.
        return torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True)
    # A graph would copy from the host's memory again at its replays; a kernel's arguments it keeps.
    groups = torch.empty(len(rows), NUMBERS + 1, dtype=torch.float64, device=device)
    for i, row in enumerate(rows):
        write_group_kernel[(1,)](groups, i, *row, flags[i], num_warps=1)
    return groups


def optimizer_step_table(
    table: Tensor,
    count: int,
    _seal: int,
    algorithm: int,
    dtypes: list[int],
    numbers: list[float],
    flags: list[int],
    rates: list[Tensor],
    rounding: int,
    squares: Tensor | None,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rng_state: Tensor | None,
    scratch: Tensor,
) -> None:
    """The op's step of the tensors in `table`."""
    if count == 0:
        return
    chunks = chunks_of(table, count)
    dtype, moments = map(type_name, dtypes)
    # Only a bfloat16 is rounded by chance, and what has 16 bits compensated.
    if dtype not in (("bf16",) if rounding == STOCHASTIC.value else ("bf16", "fp16")):
        rounding = 0
    rows = _group_rows(numbers, flags)
    with device_of(table):
        groups, rate = None, None
        if len(rows) > 1:
            capturing = table.is_cuda and torch.cuda.is_current_stream_capturing()
            groups = _on_device(rows, flags, table.device, capturing)
        if rates:
            rate = rates[0] if len(rates) == 1 else torch.stack([r.reshape(()) for r in rates])
        # Tensors without an element count their steps too: there is a program for that at least.
        optimizer_step_kernel[(max(chunks, 1),)](
            *(table, count, chunks, *rows[0], flags[0], groups, rate),
            *(squares, 0 if squares is None else squares.numel(), max_norm),
            *(grad_scale, found_inf, *state_arguments(rng_state), scratch),
            ALGORITHM=algorithm,
            DTYPE=dtype,
            MOMENTS=moments,
            ROUNDING=rounding,
            TAG=TAG_ROUNDING,
            BLOCK=_block(algorithm, dtype, moments, rounding),
            REST=REST,
            STEPS=STEPS,
            num_warps=8,
        )
