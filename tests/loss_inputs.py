"""What the tests of the losses share: logits in each layout, labels, programs that are compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from reg_kernels._mixed_target import MixedTarget

from support import DEVICE

IGNORED = -100


def is_interpreted(backend: str) -> bool:
    """Whether Triton's interpreter runs it: some milliseconds a program."""
    return backend == "triton" and DEVICE == "cpu"


def chosen(backend: str, layout: str, *options: Any, every: int = 1) -> list[Any]:
    """The combinations of options: one of `every`, and one alone where the interpreter has to run
    them. Which of them differs from layout to layout."""
    combinations = list(itertools.product(*options))
    step = len(combinations) if is_interpreted(backend) else every
    return combinations[7 * list(LAYOUTS).index(layout) % step :: step]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def labels_of(x: Tensor, ignore: int | None = None) -> Tensor:
    """Class indices for logits (N, C, ...) or (C,); a few of them `ignore`."""
    shape = (x.shape[0], *x.shape[2:]) if x.dim() > 1 else ()
    labels = torch.randint(0, x.shape[min(1, x.dim() - 1)], shape, device=x.device)
    if ignore is not None:
        labels = torch.where(torch.rand(shape, device=x.device) < 0.2, ignore, labels)
    return labels


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x,
    "strided": lambda x: torch.stack([x, x * 7], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "misaligned": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape),
    "negated": lambda x: torch._neg_view(-x),
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


def overload_of(name: str, backend: str) -> Any:
    """The registered op's overload for an implementation."""
    packet = getattr(torch.ops.reg_kernels, name)
    return getattr(packet, "default" if backend == "native" else backend)


@contextlib.contextmanager
def compiling(backend: str) -> Iterator[tuple[Any, Any]]:
    """torch.compile(fullgraph=True) by `backend`, and a counter of the programs that it made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def distance(values: Any, truth: Any) -> float:
    """The largest difference of lists of tensors; NaN where one is NaN."""
    differences = [
        (a.detach().double() - b.detach().double()).abs().amax()
        for a, b in zip(values, truth, strict=True)
        if a.numel()
    ]
    return float(torch.stack(differences).max()) if differences else 0.0


def check_twice(ours: Any, theirs: Any, truth: Any) -> None:
    """Each of ours is at most twice as far from the truth as torch's, plus the rounding of what is
    stored, and of the sums before it."""
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        compute = torch.promote_types(a.dtype, torch.float32)
        rounding = torch.finfo(a.dtype).eps / 2 + 4 * torch.finfo(compute).eps
        largest = float(c.detach().abs().max())
        assert distance([a], [c]) <= 2 * distance([b], [c]) + rounding * largest


def check_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], **tolerances: float) -> None:
    """Value, and gradients for an incoming one that differs at each position; by default to within
    roundings of float64."""
    tolerances = tolerances or {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerances)
    g = torch.randn_like(theirs)
    ours, theirs = (torch.autograd.grad(t, leaves, g, retain_graph=True) for t in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerances)


def distillation_by_torch(
    x: Tensor,
    teacher: Tensor,
    target: Any,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """alpha T^2 KL + (1 - alpha) CE of torch's own functions."""
    dim = min(1, x.dim() - 1)
    log_q = (x / temperature).log_softmax(dim)
    p = (teacher.to(x.dtype) / temperature).softmax(dim)
    divergence = TF.kl_div(log_q, p, reduction="none").sum(dim)
    divergence = {"none": divergence, "mean": divergence.mean(), "sum": divergence.sum()}[reduction]
    if isinstance(target, MixedTarget):
        a, b, lam = target.labels, target.partner_labels, target.lam
        of_labels = lam * TF.cross_entropy(x, a, reduction=reduction, **options)
        of_labels = of_labels + (1 - lam) * TF.cross_entropy(x, b, reduction=reduction, **options)
    else:
        of_labels = TF.cross_entropy(x, target, reduction=reduction, **options)
    return alpha * temperature**2 * divergence + (1 - alpha) * of_labels


def results(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """The loss of x, and its gradient for incoming ones that differ."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, *args, **options)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
    g = g.add(0.3).to(y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaf, g)]
