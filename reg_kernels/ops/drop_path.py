"""Stochastic depth: schema, check, validation, and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..reference import drop_path as reference
from ._checks import Entry, check_batch, check_flag, check_like, hand_over, probability, refuse
from ._route import DRAWN, Draw, Linear, draw_samples


def _check(op: str, a: Any, in_place: bool) -> None:
    entry = Entry(op, a.input)
    entry.check_samples(a.input)
    entry.check_probability(a.p)
    entry.check_drawn(a)
    entry.check_like(a.input, a.residual, "residual")


MODES = ("row", "batch")

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
    residual: Tensor | None = None,
    mode: str = "row",
    scale_by_keep: bool = True,
    rng_state: Tensor | None = None,
    sample_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Drops whole samples of a branch (stochastic depth) and adds the residual in the same pass.

    The result is :math:`y_n = r_n + m_n x_n`, with :math:`m_n` drawn as in `dropout`. A dropped
    sample is not read: its place holds the residual, or 0, and its gradient is 0.

    Args:
        input: the branch, a batch (N, ...); float64, float32, float16 or bfloat16.
        p: the probability of dropping a sample, in [0, 1].
        training: False drops nothing and scales nothing.
        residual: a tensor of the input's shape, dtype and device that is added, or None.
        mode: "row" draws for each sample; "batch" draws once, for all of them.
        scale_by_keep: False leaves the kept samples unscaled.
        sample_offset: the place of the input's first sample in the whole batch's mask. With it a
            shard of a batch gets its part; in mode "batch" all shards have the same draw anyway.
        rng_state, backend: as in `dropout`.

    Returns:
        A tensor of the input's shape and dtype; `input` itself where nothing is dropped and nothing
        is added.

    Raises:
        ValueError: `p` is outside [0, 1], or `mode` or `backend` is unknown.
        TypeError: `input` or `residual` is no tensor, or `scale_by_keep` no bool.
        RuntimeError: `input` is no batch, `residual` unlike it, and as `dropout` raises it.

    Source: G. Huang et al., "Deep networks with stochastic depth", ECCV 2016.
    """
    if has_torch_function_variadic(input, residual):
        return hand_over(drop_path, locals(), "input", "residual")
    p = probability("drop_path", "p", p)
    check_flag("drop_path", "scale_by_keep", scale_by_keep)
    check_batch("drop_path", "input", input)
    if mode not in MODES:
        refuse("drop_path", "mode", "'row' or 'batch'", repr(mode), ValueError)
    if residual is not None:
        check_like("drop_path", "residual", residual, input)
    if not training or p == 0.0:
        return input if residual is None else input + residual
    if mode == "batch":  # all of them as one sample
        how = Draw(p, rng_state, 0, backend)
        whole = None if residual is None else residual.unsqueeze(0)
        return draw_samples(
            _DROP_PATH, input.unsqueeze(0), how, (scale_by_keep,), (whole,)
        ).squeeze(0)
    how = Draw(p, rng_state, sample_offset, backend)
    return draw_samples(_DROP_PATH, input, how, (scale_by_keep,), (residual,))
