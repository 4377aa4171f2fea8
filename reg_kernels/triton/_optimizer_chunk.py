"""Steps a chunk of a tensor in a table, and the tensors' step counters."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._rng import TAG_ROUNDING
from ._optimizer_rule import (
    ADAM,
    AVERAGE,
    KAHAN,
    RATE_ON_DEVICE,
    STOCHASTIC,
    Group,
    adam_moments,
    adam_values,
    ema_values,
    larger_moment,
    regularised_gradient,
    sgd_momentum,
    sgd_values,
    soft_threshold,
    step_rule,
    stochastic_bfloat16,
)
from ._random import half_word_at, half_words, load_state
from ._table import (
    COMPENSATION,
    ELEMENT_OFFSET,
    EMA,
    FIRST_MOMENT,
    GRAD,
    GROUP,
    MAX_SECOND_MOMENT,
    PARAM,
    RUN,
    RUN_STRIDE,
    SECOND_MOMENT,
    STEP,
    address_at,
    chunk_at,
    pointer_to,
    row_at,
    vectored_elements,
)
from ._types import compute_type

TAG = tl.constexpr(TAG_ROUNDING)
NUMBERS = 8  # of a group; its flags are one more
WORDS = tl.constexpr(NUMBERS + 1)


class StepForm(NamedTuple):
    """What kernels are compiled for: one constexpr, FORM."""

    ALGORITHM: int
    T: tl.dtype  # of parameters and gradients
    S: tl.dtype  # of moments
    ROUNDING: int
    BLOCK: int  # elements at a time
    REST: int  # elements at a time, where they cannot be moved in vectors
    STEPS: int  # step counters at a time, when the last program adds to them


class Arrays(NamedTuple):
    """Where a chunk begins in each array of its tensor, 0 where there is none."""

    param: Any
    grad: Any
    first_moment: Any
    second_moment: Any
    max_second_moment: Any
    ema: Any
    compensation: Any


class Stream(NamedTuple):
    """A chunk's draws: the stream's key and offset, where the tensor's first element is among
    them, the tensor's runs, and the chunk's first element."""

    key: Any
    offset: Any
    place: Any
    run: Any
    stride: Any
    first: Any


@triton.jit
def group_of(numbers, flags):
    """The Group of a kernel's arguments. The interpreter takes the numbers for float32."""
    return Group(*[tl.full([], x, tl.float64) for x in numbers], flags)


@triton.jit
def load_group(groups_ptr, number):
    row_ptr = groups_ptr + number * WORDS
    numbers = [tl.load(row_ptr + i) for i in (0, 1, 2, 3, 4, 5, 6, 7)]
    return Group(*numbers, tl.load(row_ptr + 8).to(tl.int32))


@triton.jit
def store_group(groups_ptr, number, group):
    for i in tl.static_range(WORDS):
        tl.store(groups_ptr + number * WORDS + i, group[i])


@triton.jit
def update_block(
    arrays,
    rule,
    stream,
    first,  # element of the chunk
    block,
    count,  # elements from `first` on
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
):
    """Steps one block of a chunk."""
    T: tl.constexpr = FORM.T
    S: tl.constexpr = FORM.S
    COMPUTE: tl.constexpr = compute_type(T)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    i = first + at
    p_ptr = pointer_to(arrays.param, T, ALIGNED) + i
    g_ptr = pointer_to(arrays.grad, T, ALIGNED) + i
    m_ptr = pointer_to(arrays.first_moment, S, ALIGNED) + i

    p = tl.load(p_ptr, mask=inside, other=0.0).to(COMPUTE)
    g = tl.load(g_ptr, mask=inside, other=0.0).to(COMPUTE)
    if FORM.ALGORITHM == ADAM:
        m = tl.load(m_ptr, mask=inside, other=0.0).to(COMPUTE)
    if FORM.ROUNDING == KAHAN:
        # What rounding took off the parameter so far is still part of it.
        lost_ptr = pointer_to(arrays.compensation, T, ALIGNED) + i
        has_lost = inside & (arrays.compensation != 0)
        p += tl.load(lost_ptr, mask=has_lost, other=0.0).to(COMPUTE)
    # A branch skips each array that may be absent. Masks would take a quarter more registers.
    if FORM.ALGORITHM == ADAM:
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
    if FORM.ROUNDING == STOCHASTIC:
        if ALIGNED:  # and its draws are
            first_group = (stream.place + stream.first + first + block * BLOCK) // 8
            drawn = half_words(stream.key, stream.offset, first_group, BLOCK // 8)
        else:
            element = stream.first + i
            place = stream.place + element // stream.run * stream.stride + element % stream.run
            drawn = half_word_at(stream.key, stream.offset, place)
        stored = stochastic_bfloat16(p, drawn)
    else:
        stored = p.to(T)
    tl.store(p_ptr, stored, mask=inside)
    if FORM.ROUNDING == KAHAN:
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
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
):
    """Updates the average of one block of a chunk, and leaves the parameter as it is."""
    COMPUTE: tl.constexpr = compute_type(FORM.T)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = (at < count) & (arrays.ema != 0)
    p_ptr = pointer_to(arrays.param, FORM.T, ALIGNED) + first + at
    ema_ptr = pointer_to(arrays.ema, COMPUTE, ALIGNED) + first + at
    p = tl.load(p_ptr, mask=inside, other=0.0).to(COMPUTE)
    ema = tl.load(ema_ptr, mask=inside, other=0.0)
    tl.store(ema_ptr, ema_values(rule, ema, p), mask=inside)


@triton.jit
def step_block(
    arrays,
    rule,
    stream,
    first,
    block,
    count,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
):
    if FORM.ALGORITHM == AVERAGE:
        average_block(arrays, rule, first, block, count, ALIGNED, BLOCK, FORM)
    else:
        update_block(arrays, rule, stream, first, block, count, ALIGNED, BLOCK, FORM)


@triton.jit
def load_arrays(chunk, T: tl.constexpr, S: tl.constexpr):
    return Arrays(
        address_at(chunk, PARAM, T),
        address_at(chunk, GRAD, T),
        address_at(chunk, FIRST_MOMENT, S),
        address_at(chunk, SECOND_MOMENT, S),
        address_at(chunk, MAX_SECOND_MOMENT, S),
        address_at(chunk, EMA, compute_type(T)),
        address_at(chunk, COMPENSATION, T),
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
    group,  # of all tensors where there is no groups_ptr
    groups_ptr,
    rates_ptr,
    factor,
    state_ptr,
    seed,
    offset,
    FORM: tl.constexpr,
):
    """Steps the program's chunk."""
    COMPUTE: tl.constexpr = compute_type(FORM.T)
    chunk = chunk_at(table_ptr, count, tl.program_id(0))
    if groups_ptr is not None:
        group = load_group(groups_ptr, row_at(chunk, GROUP))
    if rates_ptr is not None:
        on_device = group.flags & RATE_ON_DEVICE != 0
        rate = tl.load(rates_ptr + group.lr.to(tl.int32), mask=on_device, other=0.0)
        group = Group(tl.where(on_device, rate.to(tl.float64), group.lr), *group[1:])
    address = row_at(chunk, STEP)
    step = tl.load(step_pointer(address), mask=address != 0, other=0.0) + 1.0
    rule = step_rule(group, step.to(tl.int64), factor, FORM.ALGORITHM, COMPUTE)
    arrays = load_arrays(chunk, FORM.T, FORM.S)
    stream = Stream(0, 0, 0, 0, 0, 0)
    if FORM.ROUNDING == STOCHASTIC:
        seed, offset = load_state(state_ptr, seed, offset)
        place, run = row_at(chunk, ELEMENT_OFFSET), row_at(chunk, RUN)
        side_by_side = (run == 0) & (place % 8 == 0)
        run = tl.where(run == 0, 1 << 62, run)
        stride = row_at(chunk, RUN_STRIDE)
        stream = Stream(seed ^ TAG, offset, place, run, stride, chunk.first)

    addresses = arrays.param | arrays.grad | arrays.first_moment | arrays.second_moment
    addresses = addresses | arrays.max_second_moment | arrays.ema | arrays.compensation
    if FORM.ROUNDING == STOCHASTIC:
        # What goes in vectors is drawn for by whole groups.
        addresses = addresses | tl.where(side_by_side, 0, 1)
    vectored = vectored_elements(chunk.rest, addresses)
    rest = chunk.rest - vectored
    # The rest goes first, so that the loop over vectors, which needs many registers, is the last.
    block = 0
    while block * FORM.REST < rest:
        step_block(arrays, rule, stream, vectored, block, rest, False, FORM.REST, FORM)
        block += 1
    block = 0
    while block * FORM.BLOCK < vectored:
        step_block(arrays, rule, stream, 0, block, vectored, True, FORM.BLOCK, FORM)
        block += 1
