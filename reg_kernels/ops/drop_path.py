"""Stochastic depth: schema, check, validation, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._layout import as_torch_returns, is_dense, with_strides
from ..reference import drop_path as reference
from ._checks import Entry, check_like, check_tensor, hand_over, probability
from ._modes import TRACE, watcher
from ._route import DRAWN, Draw, Linear, asked, draw


def _has_samples_outermost(x: Tensor) -> bool:
    """Whether each sample of a batch (N, ...) fills one stretch of memory, after the one before."""
    return is_dense(x) and (len(x) < 2 or x.stride(0) * len(x) == x.numel() or x.numel() == 0)


def _check(op: str, a: Any) -> None:
    entry = Entry(op, a.input)
    if a.input.dim() == 0 or not _has_samples_outermost(a.input):
        entry.refuse("input", "a batch, dense with its samples outermost", a.input)
    entry.check_drawn(a)
    entry.check_floats(a.input, "input")
    entry.check_memory(a.input, "input")
    entry.check_like(a.input, a.residual, "residual")


_DROP_PATH = Linear(
    "drop_path",
    f"float p, bool scale_by_keep, {DRAWN}",
    addends=("residual",),
    reference=reference.drop_path,
    triton="drop_path",
    check=_check,
    keeps=("rng_state", "traced_p"),
    reads_dropped=False,
)


def drop_path(
    input: Tensor,
    p: float,
    training: bool = True,
    *,
    scale_by_keep: bool = True,
    residual: Tensor | None = None,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Drops whole samples, stochastic depth, and adds the residual in the same pass:
    :math:`y_n = r_n + m_n x_n`, :math:`m_n \in \{0, 65536 / T\}`, kept with probability
    :math:`T / 65536`, :math:`T = \mathrm{round}(65536 (1 - p))`.

    A sample that is dropped is not read: whatever it holds, NaN included, its place has the
    residual, or 0. The same holds in the backward for its gradient, which is 0.

    Args:
        input: the branch, a batch (N, ...); float64, float32, float16 or bfloat16.
        p: the probability of dropping a sample, in [0, 1].
        training: False drops nothing and scales nothing.
        scale_by_keep: False leaves a kept sample as it is: m is 0 or 1.
        residual: what the branch is added to, of the input's shape, dtype and device; or None.
        rng_state: int64 tensor `[seed, offset]`, as `dropout` takes it.
        element_offset: the index, in the mask, of the input's first sample: a shard of a batch then
            gets its part of the whole batch's mask.
        backend: "native", "triton" or "reference"; by default the first that can run here.

    Returns:
        A tensor like `input`; `input` itself where nothing can be dropped and nothing is added.

    Raises:
        ValueError: `p` outside [0, 1], or an unknown `backend`.
        RuntimeError: another dtype, a residual that is not like the input, an `rng_state` of
            another shape, dtype or device, or a `backend` that cannot run here.
        TypeError: something that is no tensor.

    One draw a sample from Philox4x32-10, in each implementation the same. 16-bit floats are
    computed in float32 and rounded once.

    Source: G. Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """
    if has_torch_function_variadic(input, residual):
        return hand_over(drop_path, locals(), "input", "residual")
    name = "drop_path"
    p = probability(name, "p", p)
    check_tensor(name, "input", input)
    if input.dim() == 0:
        raise RuntimeError(f"{name}: input must be a batch (N, ...), got no dimensions")
    if residual is not None:
        check_like(name, "residual", residual, input)
    looks = watcher()
    if not training or p == 0.0 or asked(looks, input.numel) == 0:
        return input if residual is None else input + residual
    # Kernels take each sample as one stretch of memory; what is traced has to bring any into it.
    fits = looks is not TRACE and _has_samples_outermost(input)
    x = input if fits else input.contiguous()
    residual = None if residual is None else with_strides(residual, x.stride())
    if p == 1.0 and rng_state is None:  # nothing to draw
        rng_state = torch.zeros(2, dtype=torch.int64)
    how = Draw(p, rng_state, element_offset, backend)
    y = draw(_DROP_PATH, x, how, False, (scale_by_keep,), (residual,))
    return y if fits or looks is TRACE else as_torch_returns(y, input)
