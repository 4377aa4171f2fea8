"""Stochastic depth: layers that drop a branch for some samples, and a block that skips it."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .. import _part, backends
from .. import functional as F
from .._compiler import not_compiled
from .._twins import TWINS, twin_of
from ..ops._checks import (
    check_batch,
    check_flag,
    check_like,
    check_tensor,
    probability,
    refuse,
)
from ..ops._draw import refuse_draws
from ..ops._modes import watcher
from ..ops._route import asked
from ..ops.drop_path import MODES
from ..ops.subset import Subset, add_of_subset
from ._leaf import call_in_graph

__all__ = ["DropPath", "StochasticDepth", "StochasticDepthBlock", "drop_path_rates"]


class DropsPaths(torch.nn.Module):
    """What the layers share: a call `layer(input, residual=None, layer_scale=None)`, and which
    implementation it runs.

    A layer of another package becomes one by a change of its class (`convert`), so what is asked
    for here is what those have.
    """

    backend: str | None = None

    def _drops(self) -> tuple[float, dict[str, Any]]:
        """The probability, and the function's options."""
        raise NotImplementedError

    def forward(
        self, input: Tensor, residual: Tensor | None = None, layer_scale: Tensor | None = None
    ) -> Tensor:
        given: tuple[Any, ...] = (input,) if residual is None else (input, residual)
        if layer_scale is not None:
            given = (input, residual, layer_scale)
        if has_torch_function(given) and (call := call_in_graph(self, *given)) is not None:
            return call
        p, options = self._drops()
        if layer_scale is not None:
            options["layer_scale"] = layer_scale
        return F.drop_path(
            *(input, p, self.training), residual=residual, backend=self.backend, **options
        )


class DropPath(DropsPaths):
    """Drops whole samples of a branch by `functional.drop_path`: `layer(input, residual=None,
    layer_scale=None)`.

    Args:
        drop_prob: the probability of dropping a sample, in [0, 1].
        scale_by_keep: True divides the kept samples by the probability of keeping one.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Shape: a branch (N, ...), a residual of its shape and a layer scale as in
    `functional.drop_path`; the result has the branch's shape.

    Raises:
        ValueError: `drop_prob` is outside [0, 1], or `backend` is unknown.
        TypeError: `drop_prob` is no number.

    timm's layer of this name has the same arguments; without a residual it gives the same.

    Source: as for `functional.drop_path`.
    """

    drop_prob: float
    scale_by_keep: bool

    def __init__(
        self, drop_prob: float = 0.0, scale_by_keep: bool = True, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.drop_prob = probability(type(self).__name__, "drop_prob", drop_prob)
        check_flag(type(self).__name__, "scale_by_keep", scale_by_keep)
        self.scale_by_keep = scale_by_keep
        if backend is not None:
            self.backend = backends.check_name(backend, "backend")

    def _drops(self) -> tuple[float, dict[str, Any]]:
        # timm's default was None once.
        return self.drop_prob or 0.0, {"scale_by_keep": self.scale_by_keep}

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


class StochasticDepth(DropsPaths):
    """`DropPath` with torchvision's arguments, by `functional.drop_path`: `layer(input,
    residual=None, layer_scale=None)`.

    Args:
        p: the probability of dropping, in [0, 1].
        mode: "row" draws for each sample; "batch" draws once, for all of them.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Shape: as for `DropPath`: a branch (N, ...), and what has its shape.

    Raises:
        ValueError: `p` is outside [0, 1], or `mode` or `backend` is unknown.
        TypeError: `p` is no number.

    Source: as for `functional.drop_path`; the arguments are those of torchvision's layer.
    """

    p: float
    mode: str

    def __init__(self, p: float, mode: str, *, backend: str | None = None) -> None:
        super().__init__()
        self.p = probability(type(self).__name__, "p", p)
        self.mode = _checked_mode(type(self).__name__, mode, MODES)
        if backend is not None:
            self.backend = backends.check_name(backend, "backend")

    def _drops(self) -> tuple[float, dict[str, Any]]:
        return self.p, {"mode": self.mode}

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


def _checked_mode(name: str, mode: Any, modes: Sequence[str]) -> str:
    if mode not in modes:
        *first, last = map(repr, modes)
        refuse(name, "mode", f"{', '.join(first)} or {last}", repr(mode), ValueError)
    return str(mode)


class StochasticDepthBlock(torch.nn.Module):
    r"""A residual block :math:`x + \text{branch}(x)` whose branch is skipped at random in training.

    - `mode="batch"`: one coin for the batch, thrown on the host by torch's CPU generator. Where it
      drops, the branch is not computed at all; else the result is :math:`x + \text{branch}(x) /
      (1 - p)`.
    - `mode="subset"`: the branch is computed of :math:`k = \mathrm{round}((1 - p) N)` samples that
      are chosen at random, and added to those, scaled by :math:`N / k`. A BatchNorm in the branch
      sees these samples alone. The time is the same at each step.
    - `mode="row"`: the branch is computed of all samples and dropped for some (`drop_path`), which
      saves no time. It is what the other two can be compared with.

    After `eval()` it is :math:`x + \text{branch}(x)`. Parameters of a branch that was not computed
    get no gradient: their `grad` stays None (after `zero_grad()`), and an optimizer does not move
    them, by weight decay or momentum neither. DistributedDataParallel then needs
    `find_unused_parameters=True`, even where the ranks have the same coins; with `mode="subset"`
    and k above 0 it does not. `torch.compile` breaks its graph at the coin.

    Args:
        branch: a module whose output has its input's shape.
        p: the probability of skipping, in [0, 1].
        mode: "batch", "subset" or "row".
        backend: "native", "triton" or "reference", for the modes "row" and "subset".

    Shape: a batch (N, ...), and so is the result.

    Raises:
        ValueError: `p` is outside [0, 1], or `mode` or `backend` is unknown.
        TypeError: `branch` is no module, or `p` no number.
        RuntimeError: at a call, the branch's output is not like the input.

    Source: G. Huang et al., "Deep networks with stochastic depth", ECCV 2016 (the coin of a batch);
    the fixed number of samples is that of M. Oquab et al., "DINOv2", TMLR 2024.
    """

    def __init__(
        self,
        branch: torch.nn.Module,
        p: float,
        mode: str = "batch",
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(branch, torch.nn.Module):
            refuse(name, "branch", "an nn.Module", type(branch).__name__, TypeError)
        self.branch = branch
        self.p = probability(name, "p", p)
        self.mode = _checked_mode(name, mode, ("batch", "subset", "row"))
        self.backend = None if backend is None else backends.check_name(backend, "backend")

    def forward(self, input: Tensor) -> Tensor:
        if has_torch_function((input,)) and (call := call_in_graph(self, input)) is not None:
            return call
        if not self.training or self.p == 0.0:
            return input + self._of(input)
        looks = watcher()
        refuse_draws(type(self).__name__, looks)
        if self.mode == "row":
            branch = self._of(input)
            return F.drop_path(branch, self.p, residual=input, backend=self.backend)
        if self.mode == "batch":
            if torch.rand(()).item() < self.p:
                return input
            return torch.add(input, self._of(input), alpha=1 / (1 - self.p))
        return self._of_a_subset(input, looks)

    def _of(self, input: Tensor) -> Tensor:
        branch = self.branch(input)
        check_tensor(type(self).__name__, "the branch's output", branch)
        if branch.dtype != input.dtype and torch.is_autocast_enabled(input.device.type):
            branch = branch.to(input.dtype)
        check_like(type(self).__name__, "the branch's output", branch, input)
        return branch

    def _of_a_subset(self, input: Tensor, looks: str | None) -> Tensor:
        check_batch(type(self).__name__, "input", input)
        part = _part.of_order(input.device) if _part.used else None
        if part is not None and not part.alike:
            rows = part.rows(type(self).__name__, input.shape)
            return self._of_a_subset_of_all(input, rows)
        # Not len(input), which in torch.export is a constant.
        samples = asked(looks, input.size, 0)
        kept = round((1 - self.p) * samples)
        if kept == 0:
            return input
        order = torch.randperm(samples, device=input.device)
        # In order, so that memory is read in order.
        subset = Subset(order[:kept].sort().values, order[kept:])
        return add_of_subset(input, self._of, subset, samples / kept, self.backend)

    @not_compiled  # how many samples are this rank's is a number to wait for
    def _of_a_subset_of_all(self, input: Tensor, part: _part.Part) -> Tensor:
        """The same where the input is a part of the batch that samples are chosen of. The branch
        gets this rank's, be it none, and draws for them as for a part of what was chosen."""
        kept = round((1 - self.p) * part.total)
        if kept == 0:
            return input
        order = torch.randperm(part.total, device=input.device)
        chosen = order[:kept].sort().values
        ends = chosen.new_tensor([part.first, part.first + len(input)])
        begin, end = torch.searchsorted(chosen, ends).tolist()
        own = chosen[begin:end] - part.first
        dropped = torch.ones(len(input), dtype=torch.bool, device=input.device)
        dropped[own] = False
        subset = Subset(own, dropped.nonzero().flatten())
        scale = part.total / kept
        with _part.Stated(_part.Part(begin, kept, end - begin)):
            return add_of_subset(input, self._of, subset, scale, self.backend)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


def drop_path_rates(rate: float, depths: int | Sequence[int]) -> list[Any]:
    """The probabilities of dropping that grow linearly with depth, from 0 to `rate`.

    Args:
        rate: that of the last block, in [0, 1].
        depths: the number of blocks, or the numbers of each stage's.

    Returns:
        A list of floats, one a block; of stages a list of such lists.

    Raises:
        ValueError: `rate` is outside [0, 1], or `depths` are no counts.
        TypeError: `rate` is no number.

    Source: G. Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3 (its linear
    decay of survival, with 0 for the first block as it is in timm).
    """
    rate = probability("drop_path_rates", "rate", rate)
    if not isinstance(depths, int | Sequence):
        kind = type(depths).__name__
        refuse("drop_path_rates", "depths", "a number of blocks or a list of them", kind, TypeError)
    stages = [depths] if isinstance(depths, int) else list(depths)
    for depth in stages:
        if type(depth) is not int or depth < 0:
            refuse("drop_path_rates", "depths", "counts of blocks", repr(depths), ValueError)
    blocks = sum(stages)
    rates = iter([rate * i / max(1, blocks - 1) for i in range(blocks)])
    found = [list(itertools.islice(rates, depth)) for depth in stages]
    return found[0] if isinstance(depths, int) else found


class _DropPathOfX(DropPath):
    """timm's calls its input x, and so do those who call it."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, layer_scale: Tensor | None = None
    ) -> Tensor:
        return super().forward(x, residual, layer_scale)


# The layers of packages that may be there or not: where their classes are, and which of ours does
# their work. A twin is made when `convert` meets a package that was imported, or when pickle asks.
_OF_PACKAGES: dict[str, tuple[str, str, type[DropsPaths]]] = {
    "TimmDropPath": ("timm.layers.drop", "DropPath", _DropPathOfX),
    "TorchvisionStochasticDepth": (
        *("torchvision.ops.stochastic_depth", "StochasticDepth"),
        StochasticDepth,
    ),
}


def find_twins_of_packages() -> None:
    """Registers the twins of the layers of packages that were imported."""
    for name, (module, _, _) in _OF_PACKAGES.items():
        if module in sys.modules:
            _twin(name)


def _twin(name: str) -> type[torch.nn.Module]:
    module, original, ours = _OF_PACKAGES[name]
    layer = getattr(importlib.import_module(module), original)
    if layer not in TWINS:
        body = {"__module__": __name__, "__doc__": layer.__doc__}
        globals()[name] = twin_of(layer)(type(name, (ours, layer), body))
    return TWINS[layer]


def __getattr__(name: str) -> Any:
    if name in _OF_PACKAGES:
        return _twin(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
