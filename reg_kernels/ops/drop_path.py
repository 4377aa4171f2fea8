"""Stochastic depth: schema, check, validation, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._dtypes import computed_in
from .._numbers import integer
from ..reference import drop_path as reference
from ._checks import (
    Entry,
    check_batch,
    check_device,
    check_dtype,
    check_flag,
    check_like,
    check_tensor,
    hand_over,
    probability,
    refuse,
)
from ._draw import DRAWN, Draw, draw_samples, state_of_all
from ._modes import shows_values, watcher
from ._route import Linear

MODES = ("row", "batch")

_BROADCAST = "of one element, or broadcast along one dimension that is not the batch's"
# Elements of a sample that is worth calls of its own for a sum, whose products the caches hold.
_LARGE = 2**14


def _check(op: str, a: Any, in_place: bool) -> None:
    entry = Entry(op, a.input)
    entry.check_samples(a.input)
    entry.check_probability(a.p)
    entry.check_drawn(a)
    entry.check_like(a.input, a.residual, "residual")
    if a.layer_scale is not None:
        compute = computed_in(a.input.dtype)
        entry.check_vector(a.layer_scale, compute, a.layer_scale.numel(), "layer_scale")
        if not broadcasts(a.layer_scale, a.input):
            entry.refuse("layer_scale", _BROADCAST, a.layer_scale)


def broadcasts(layer_scale: Tensor, input: Tensor) -> bool:
    """Whether it is one number, or has one for each place of one of the input's dimensions, which
    is not the batch's."""
    missing = input.dim() - layer_scale.dim()
    wide = [(d + missing, size) for d, size in enumerate(layer_scale.shape) if size != 1]
    fits = all(d > 0 and input.shape[d] == size for d, size in wide)
    return missing >= 0 and len(wide) <= 1 and fits


def _check_layer_scale(layer_scale: Any, input: Tensor) -> None:
    check_tensor("drop_path", "layer_scale", layer_scale, "a Tensor or None")
    check_dtype("drop_path", "layer_scale", layer_scale.dtype)
    check_device("drop_path", "layer_scale", layer_scale, input)
    if not broadcasts(layer_scale, input):
        own, other = tuple(layer_scale.shape), tuple(input.shape)
        raise RuntimeError(
            "drop_path: layer_scale must broadcast against the input, along one dimension that is "
            f"not the batch's or as one number, got shape {own} beside {other}"
        )


def _by_layer_scale(
    overload: Any, grad_output: Tensor, input: Tensor, layer_scale: Tensor, *arguments: Any
) -> Tensor:
    """The layer scale's gradient. Each sample is summed by itself, and what was dropped is left
    out of the sum of those: its values count for nothing, be they NaN. Where the host sees what was
    drawn, it is not read either."""
    compute, dims = layer_scale.dtype, input.dim()
    drawn = _DROP_PATH.drawn(overload, input.new_ones(input.shape[0], dtype=compute), arguments)
    shape = (*[1] * (dims - layer_scale.dim()), *layer_scale.shape)[1:]
    looks = watcher()
    if looks is None and shows_values(input, looks) and input.numel() >= _LARGE * input.shape[0]:
        samples = zip(drawn.tolist(), grad_output.unbind(), input.unbind(), strict=True)
        kept = [(g.to(compute) * x.to(compute)).sum_to_size(shape) * m for m, g, x in samples if m]
        if kept:
            return torch.stack(kept).sum(0).view(layer_scale.shape)
    drawn = drawn.view(-1, *[1] * (dims - 1))
    sums = (grad_output.to(compute) * input.to(compute)).sum_to_size(input.shape[0], *shape)
    return torch.where(drawn == 0, 0, sums * drawn).sum(0).view(layer_scale.shape)


_DROP_PATH = Linear(
    "drop_path",
    f"float p, bool scale_by_keep, {DRAWN}",
    addends=("residual",),
    multiplier="layer_scale",
    by_multiplier=_by_layer_scale,
    reference=reference.drop_path,
    triton="drop_path",
    check=_check,
    keeps=("rng_state", "traced_p"),
    draws_of=1,
    reads_dropped=False,
)


def drop_path(
    input: Tensor,
    p: float,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    mode: str = "row",
    scale_by_keep: bool = True,
    rng_state: Tensor | None = None,
    sample_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Drops whole samples of a branch (stochastic depth) and adds the residual in the same pass.

    The result is :math:`y_n = r_n + m_n x_n`, with :math:`m_n` drawn as in `dropout`. A dropped
    sample is not read: its place holds the residual, or 0, and its gradient is 0. With a layer
    scale :math:`\gamma`, it is :math:`y_n = r_n + (\gamma m_n) x_n`, still in one pass.

    Args:
        input: the branch, a batch (N, ...); float64, float32, float16 or bfloat16.
        p: the probability of dropping a sample, in [0, 1].
        training: False drops nothing and scales nothing.
        residual: a tensor of the input's shape, dtype and device that is added, or None.
        layer_scale: factors that broadcast against the input, one for each place of one of its
            dimensions, as (C,) does for (N, L, C) and (C, 1, 1) for (N, C, H, W), or a single one.
            Of any of the four types: it is computed in float32, or float64 for that input. The
            input is kept for its gradient.
        mode: "row" draws for each sample; "batch" draws once, for all of them.
        scale_by_keep: False leaves the kept samples unscaled.
        sample_offset: the place of the input's first sample in the whole batch's mask. With it a
            shard of a batch gets its part; in mode "batch" all shards have the same draw anyway. 0
            is what `distributed.shard` says, if anything.
        rng_state, backend: as in `dropout`.

    Returns:
        A tensor of the input's shape and dtype; `input` itself where nothing is dropped, scaled or
        added.

    Raises:
        ValueError: `p` is outside [0, 1], or `mode` or `backend` is unknown.
        TypeError: `input`, `residual` or `layer_scale` is no tensor, or `scale_by_keep` no bool.
        RuntimeError: `input` is no batch, `residual` unlike it, `layer_scale` does not broadcast
            so, and as `dropout` raises it.

    Source: G. Huang et al., "Deep networks with stochastic depth", ECCV 2016; the layer scale is
    that of H. Touvron et al., "Going deeper with image transformers", ICCV 2021.
    """
    if has_torch_function_variadic(input, residual, layer_scale):
        return hand_over(drop_path, locals(), "input", "residual", "layer_scale")
    p = probability("drop_path", "p", p)
    check_flag("drop_path", "scale_by_keep", scale_by_keep)
    check_batch("drop_path", "input", input)
    if mode not in MODES:
        refuse("drop_path", "mode", "'row' or 'batch'", repr(mode), ValueError)
    sample_offset = integer("drop_path", "sample_offset", sample_offset)
    if not 0 <= sample_offset < 2**62:
        refuse("drop_path", "sample_offset", "in [0, 2^62)", sample_offset, ValueError)
    if residual is not None:
        check_like("drop_path", "residual", residual, input)
    if layer_scale is not None:
        _check_layer_scale(layer_scale, input)
        layer_scale = layer_scale.to(computed_in(input.dtype)).contiguous()
        p = p if training else 0.0
    elif not training or p == 0.0:
        return input if residual is None else input + residual
    options = (scale_by_keep,)
    if mode == "batch":  # all of them as one sample
        if rng_state is None:
            rng_state = state_of_all(input, watcher(), 0.0 < p < 1.0)
        how = Draw(p, rng_state, 0, backend)
        whole = None if residual is None else residual.unsqueeze(0)
        one = draw_samples(_DROP_PATH, input.unsqueeze(0), how, options, whole, layer_scale)
        return one.squeeze(0)
    how = Draw(p, rng_state, sample_offset, backend)
    return draw_samples(_DROP_PATH, input, how, options, residual, layer_scale)
