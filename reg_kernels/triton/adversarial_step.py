"""Adversarial steps in Triton.

A step reads adv, grad and clean, and writes adv: 4 sizeof(T) bytes an element. In L-infinity a
program takes a tile of a sample; in L1 and L2 a whole sample, which it goes over several times
before: once for the gradient's norm, then for the norm of what leads away from clean, in L1 until
the threshold is found.

The loops are `while`, as in batch_norm.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._layout import is_channels_last
from ._launch import ceil_div, device_of
from ._types import compute_type

BLOCK = 2048  # elements at a time: 16 bytes a thread and load, in bf16 with 8 warps
UNSPECIALISED = ["tiles", "C", "L"]  # no recompiling by value
LINF, L1, L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class StepForm(NamedTuple):
    """What kernels are compiled for: one constexpr, FORM."""

    NORM: int
    LAST: bool  # the channels of a position lie together
    BLOCK: int


class Batch(NamedTuple):
    """The tensors and their sizes."""

    adv: tl.tensor  # [N, C, L], or [N, L, C] where LAST; written over
    grad: tl.tensor
    clean: tl.tensor
    size: tl.tensor  # elements of a sample
    C: tl.tensor
    L: tl.tensor


class Limits(NamedTuple):
    """Numbers of channels: a tile of each. ChannelNumbers in adversarial_step_math.h."""

    scale: tl.tensor
    inverse: tl.tensor
    lower: tl.tensor
    upper: tl.tensor


@triton.jit
def of_sample(values_ptr, stride, otherwise, n):
    """A number of sample n: float64 [N], or [1] of stride 0; or `otherwise`."""
    if values_ptr is None:
        return tl.full([], otherwise, tl.float64)
    else:
        return tl.load(values_ptr + n * stride)


@triton.jit
def limits_at(channels_ptr, lower, upper, at, there, batch, FORM: tl.constexpr):
    """Of elements `at` of a sample; channels [4, C], or None."""
    COMPUTE: tl.constexpr = compute_type(batch.adv.dtype.element_ty)
    if channels_ptr is None:
        one = tl.full([FORM.BLOCK], 1.0, COMPUTE)
        bounds = (tl.full([FORM.BLOCK], lower, COMPUTE), tl.full([FORM.BLOCK], upper, COMPUTE))
        return Limits(one, one, bounds[0], bounds[1])
    else:
        c = at % batch.C if FORM.LAST else at // batch.L
        p = channels_ptr + c
        return Limits(
            tl.load(p, mask=there, other=1),
            tl.load(p + batch.C, mask=there, other=1),
            tl.load(p + 2 * batch.C, mask=there, other=0),
            tl.load(p + 3 * batch.C, mask=there, other=0),
        )


@triton.jit
def clamped(value, lower, upper):
    value = tl.where(value < lower, lower, value)
    return tl.where(value > upper, upper, value)


@triton.jit
def in_order(bits):
    """16 bits, as an int16, as a number that grows with the float."""
    bits = bits.to(tl.int32)
    return tl.where(bits < 0, -(bits & 0x7FFF), bits)


@triton.jit
def stored_within(y, clean, most):
    """y in clean's type: of 16 bits the next number towards clean where y, rounded, is further than
    `most` from it."""
    rounded = y.to(clean.dtype)
    if clean.dtype.primitive_bitwidth == 16:
        here, there = (
            in_order(rounded.to(tl.int16, bitcast=True)),
            in_order(clean.to(tl.int16, bitcast=True)),
        )
        here += (here < there).to(tl.int32) - (here > there).to(tl.int32)
        bits = tl.where(here < 0, -here - 0x8000, here).to(tl.int16)
        nearer = bits.to(clean.dtype, bitcast=True)
        is_far = tl.abs(rounded.to(tl.float32) - clean.to(tl.float32)) > most
        rounded = tl.where(is_far, nearer, rounded)
    return rounded


@triton.jit
def linf_values(adv, grad, clean, step, eps, of):
    """One step; a NaN among the gradients moves nothing, one in adv or clean stays."""
    COMPUTE: tl.constexpr = compute_type(adv.dtype)
    x, g, origin = adv.to(COMPUTE), grad.to(COMPUTE), clean.to(COMPUTE)
    moved = x + tl.where(g > 0, step, tl.where(g < 0, -step, 0.0))
    y = clamped(clamped(moved, origin - eps, origin + eps), of.lower, of.upper)
    return stored_within(tl.where(origin == origin, y, origin), clean, eps)


@triton.jit
def pixel_gradients(grad, of):
    """In the type that is computed in; what is not finite counts as 0."""
    g = grad.to(of.inverse.dtype)
    return tl.where(g - g == 0, g * of.inverse, 0.0)


@triton.jit
def displacements(adv, grad, clean, length, of):
    """From clean to where the step leads, in pixels."""
    COMPUTE: tl.constexpr = compute_type(adv.dtype)
    return (adv.to(COMPUTE) - clean.to(COMPUTE)) * of.scale + length * pixel_gradients(grad, of)


@triton.jit
def counted(values, threshold, NORM: tl.constexpr):
    """What is summed up, in float64: squares, or absolute values above a threshold; no NaN."""
    if NORM == L2:
        wide = tl.where(values == values, values, 0.0).to(tl.float64)
        return wide * wide
    else:
        magnitudes = tl.abs(values)
        return tl.where(magnitudes > threshold, magnitudes, 0.0).to(tl.float64)


@triton.jit
def ball_values(adv, grad, clean, length, threshold, factor, inside, of):
    COMPUTE: tl.constexpr = compute_type(adv.dtype)
    x, origin = adv.to(COMPUTE), clean.to(COMPUTE)
    push = length * pixel_gradients(grad, of)
    way = (x - origin) * of.scale + push
    above = tl.where(way > 0, way - threshold, way + threshold)
    kept = tl.where((tl.abs(way) > threshold) | (way != way), above, 0.0)
    back = origin + factor * kept * of.inverse
    y = clamped(tl.where(inside, x + push * of.inverse, back), of.lower, of.upper)
    y = tl.where(origin == origin, y, origin)
    return stored_within(y, clean, tl.abs(y - origin))


@triton.jit(do_not_specialize=UNSPECIALISED)
def linf_kernel(
    adv_ptr,  # this and what follows: Batch
    grad_ptr,
    clean_ptr,
    steps_ptr,  # float64 [N] or [1], or None
    radii_ptr,
    step_stride,
    radius_stride,
    step: tl.float64,  # where there are none
    eps: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    channels_ptr,  # [4, C] of the type that is computed in, or None
    tiles,
    size,
    C,
    L,
    FORM: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(adv_ptr.dtype.element_ty)
    batch = Batch(adv_ptr, grad_ptr, clean_ptr, size, C, L)
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    at = (program % tiles).to(tl.int64) * FORM.BLOCK + tl.arange(0, FORM.BLOCK)
    there = at < size
    radius = of_sample(radii_ptr, radius_stride, eps, n)
    radius = tl.where(radius > 0, radius, 0.0).to(COMPUTE)
    length = of_sample(steps_ptr, step_stride, step, n).to(COMPUTE)
    of = limits_at(channels_ptr, lower, upper, at, there, batch, FORM)
    at += n * size
    adv, grad = tl.load(adv_ptr + at, mask=there), tl.load(grad_ptr + at, mask=there)
    clean = tl.load(clean_ptr + at, mask=there)
    y = linf_values(adv, grad, clean, length * of.inverse, radius * of.inverse, of)
    tl.store(adv_ptr + at, y, mask=there)


@triton.jit
def sums(
    batch,
    n,
    channels_ptr,
    lower,
    upper,
    length,
    threshold,
    OF_GRADIENT: tl.constexpr,
    FORM: tl.constexpr,
):
    """The sum over sample n of what is counted, and how many elements are above the threshold."""
    COMPUTE: tl.constexpr = compute_type(batch.adv.dtype.element_ty)
    BLOCK: tl.constexpr = FORM.BLOCK
    total = tl.zeros([BLOCK], tl.float64)
    above = tl.zeros([BLOCK], tl.int64)
    start = n * 0
    while start < batch.size:
        at = start + tl.arange(0, FORM.BLOCK)
        there = at < batch.size
        of = limits_at(channels_ptr, lower, upper, at, there, batch, FORM)
        at += n * batch.size
        grad = tl.load(batch.grad + at, mask=there, other=0)
        if OF_GRADIENT:
            values = pixel_gradients(grad, of)
        else:
            adv = tl.load(batch.adv + at, mask=there, other=0)
            clean = tl.load(batch.clean + at, mask=there, other=0)
            values = displacements(adv, grad, clean, length.to(COMPUTE), of)
        values = counted(values, threshold.to(COMPUTE), FORM.NORM)
        total += values
        above += (values > 0).to(tl.int64)
        start += FORM.BLOCK
    return tl.sum(total, 0), tl.sum(above, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def ball_kernel(
    adv_ptr,  # as of linf_kernel
    grad_ptr,
    clean_ptr,
    steps_ptr,
    radii_ptr,
    step_stride,
    radius_stride,
    step: tl.float64,
    eps: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    channels_ptr,
    tiles,
    size,
    C,
    L,
    FORM: tl.constexpr,
):
    COMPUTE: tl.constexpr = compute_type(adv_ptr.dtype.element_ty)
    batch = Batch(adv_ptr, grad_ptr, clean_ptr, size, C, L)
    n = tl.program_id(0).to(tl.int64)
    radius = of_sample(radii_ptr, radius_stride, eps, n)
    radius = tl.where(radius > 0, radius, 0.0)
    length = of_sample(steps_ptr, step_stride, step, n)
    threshold = tl.full([], 0.0, tl.float64)
    factor = tl.full([], 1.0, tl.float64)
    norm, _ = sums(batch, n, channels_ptr, lower, upper, length, threshold, True, FORM)
    if FORM.NORM == L2:
        norm = tl.sqrt(norm)
    length /= tl.where(norm > 1e-30, norm, 1e-30)
    total, count = sums(batch, n, channels_ptr, lower, upper, length, threshold, False, FORM)
    if FORM.NORM == L2:
        norm = tl.sqrt(total)
        inside = (norm > radius) == 0
        factor = tl.where(inside, 1.0, radius / tl.where(inside, 1.0, norm))
    else:
        # SampleMove::shrink.
        inside = (total > radius) == 0
        goes_on = (inside == 0) & (count > 0)
        while goes_on:
            threshold = (total - radius) / count.to(tl.float64)
            before = count
            total, count = sums(
                batch, n, channels_ptr, lower, upper, length, threshold, False, FORM
            )
            goes_on = (count > 0) & (count != before)
    start = n * 0
    while start < size:
        at = start + tl.arange(0, FORM.BLOCK)
        there = at < size
        of = limits_at(channels_ptr, lower, upper, at, there, batch, FORM)
        at += n * size
        adv, grad = tl.load(adv_ptr + at, mask=there), tl.load(grad_ptr + at, mask=there)
        clean = tl.load(clean_ptr + at, mask=there)
        y = ball_values(
            *(adv, grad, clean, length.to(COMPUTE), threshold.to(COMPUTE)),
            *(factor.to(COMPUTE), inside, of),
        )
        tl.store(adv_ptr + at, y, mask=there)
        start += FORM.BLOCK


@functools.cache
def _form(norm: int, last: bool) -> StepForm:
    return StepForm(norm, last, BLOCK)


def adversarial_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_sizes: Tensor | None,
    step_size: float,
    radii: Tensor | None,
    eps: float,
    norm: int,
    lower: float,
    upper: float,
    channels: Tensor | None,
) -> None:
    """Writes the stepped batch over adv."""
    if adv.numel() == 0:
        return
    samples, size = len(adv), adv.numel() // len(adv)
    count = adv.shape[1] if adv.dim() >= 2 else 1
    tiles = ceil_div(size, BLOCK)
    kernel, programs = (linf_kernel, samples * tiles) if norm == 0 else (ball_kernel, samples)
    strides = (int(x is not None and x.numel() > 1) for x in (step_sizes, radii))
    with device_of(adv):
        kernel[(programs,)](
            *(
                adv,
                grad,
                clean,
                step_sizes,
                radii,
                *strides,
                step_size,
                eps,
                lower,
                upper,
                channels,
            ),
            *(tiles, size, count, size // count, _form(norm, is_channels_last(adv))),
            num_warps=8,
        )
