"""What the benchmarks of losses of logits share: shapes, labels, and the truth in float64.

Shapes: logits and class probabilities (N, C, ...), labels (N, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._measure import BOTH, Contender, Scope
from ._values import compare, parts
from ._ways import Inputs, Way, calls, in_layout

# A language model's logits. The vocabulary is a multiple of no vector's length, or of every one's.
_VOCABULARY, _VOCABULARY_GPU = (512, 50257), (16384, 32768)
CLASSES = (1024, 1000)
SMALL = (64, 10)


def vocabulary(device: torch.device) -> tuple[int, int]:
    return _VOCABULARY_GPU if device.type == "cuda" else _VOCABULARY


def default_dtype(scope: Scope) -> torch.dtype:
    """The logits' dtype where one dtype is enough: on a GPU one trains in 16 bits."""
    halves = [dtype for dtype in scope.dtypes if dtype.itemsize == 2]
    return halves[0] if halves and scope.device.type == "cuda" else scope.dtypes[0]


def fits(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether memory holds every contender's logits, gradients and intermediate results."""
    if device.type != "cuda":
        return True
    memory = torch.cuda.get_device_properties(device).total_memory
    return 16 * torch.Size(shape).numel() * dtype.itemsize <= memory


def has_goals(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    of_goals = torch.bfloat16 if device.type == "cuda" else torch.float32
    return dtype == of_goals and shape == vocabulary(device)


def draw_logits(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str
) -> Tensor:
    return in_layout(torch.randn(shape, dtype=dtype, device=device).mul_(2), layout)


def draw_labels(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]), device=device)


def loss_inputs(arguments: list[tuple[Tensor, ...]]) -> Inputs:
    """Inputs of a mean loss whose first arguments are logits. What comes into the backward is 1, as
    in training, and in float16 a loss scale, since float16 loses what is less than 6e-8."""
    logits = arguments[0][0]
    upstream = 2.0**12 if logits.dtype == torch.float16 else 1.0
    grads = [logits.detach().new_full((), upstream) for _ in arguments]
    return Inputs(arguments, [of_input[:1] for of_input in arguments], grads)


class Truth:
    """A mean loss over all positions, and its gradient, in float64:
    alpha T^2 KL(softmax(teacher / T) || softmax(logits / T)) + (1 - alpha) CE. The cross-entropy is
    the sum over targets, each times its share. A target is labels, which may be smoothed, or
    probabilities.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Sequence[tuple[float, Tensor]],
        smoothing: float = 0.0,
        teacher: Tensor | None = None,
        temperature: float = 1.0,
        alpha: float = 0.0,
    ) -> None:
        self._shares = [share for share, _ in targets]
        self._smoothing, self._temperature, self._alpha = smoothing, temperature, alpha
        self._sources = (logits.detach(), *(target for _, target in targets))
        self._sources += () if teacher is None else (teacher,)
        self._classes = logits.shape[1]
        self._positions = logits.numel() // self._classes

    def check(
        self,
        name: str,
        loss: Tensor,
        gradients: Sequence[Tensor],
        upstream: Tensor,
        ours: bool,
    ) -> None:
        """Raises WrongValues unless the loss and, where there is one, its gradient are right.

        An error of the gradient counts in terms of what cancels in it, softmax and target.
        """
        eps = torch.finfo(loss.dtype).eps
        if loss.dtype.itemsize == 2:
            # One rounding; PyTorch rounds log-probabilities, numbers up to 32, before it takes
            # their exponentials.
            allowed = of_gradient = eps if ours else 16 * eps
        else:
            # Those same roundings. PyTorch adds up a position's gradients one by one besides, and
            # of 50,000 smoothed ones that is off by 600 roundings.
            allowed = 64 * eps
            of_gradient = allowed if ours else 1024 * eps
        expected = self._loss.reshape(1)
        compare(f"{name}: loss", loss.detach().reshape(1), lambda v: v, (expected,), allowed)
        for gradient in gradients:
            share = float(upstream) / self._positions
            compare(
                f"{name}: gradient",
                gradient,
                functools.partial(self._gradient, share),
                self._sources,
                of_gradient,
                floor=share / self._classes,
            )

    def _split(self, *sources: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, the distribution that the targets make, and the teacher's logits, in double."""
        logits, *rest = sources
        x = logits.double()
        q = torch.zeros_like(x)
        for share, target in zip(self._shares, rest, strict=False):
            if target.is_floating_point():
                q += share * target.double()
            else:
                hot = torch.full_like(x[:, :1], share * (1 - self._smoothing))
                q.scatter_add_(1, target.unsqueeze(1), hot).add_(
                    share * self._smoothing / self._classes
                )
        teacher = rest[len(self._shares) :]
        return x, q, teacher[0].double() if teacher else None

    @functools.cached_property
    @torch.no_grad()
    def _loss(self) -> Tensor:
        total = self._sources[0].new_zeros((), dtype=torch.float64)
        alpha, T = self._alpha, self._temperature
        for part in parts(*self._sources):
            x, q, teacher = self._split(*part)
            total -= (1 - alpha) * (q * x.log_softmax(1)).sum()
            if teacher is not None:
                log_q, log_p = (x / T).log_softmax(1), (teacher / T).log_softmax(1)
                total += alpha * T**2 * (log_p.exp() * (log_p - log_q)).sum()
        return total / self._positions

    def _gradient(self, share: float, *sources: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and the sum of the sizes of its terms."""
        x, q, teacher = self._split(*sources)
        alpha, T = self._alpha, self._temperature
        p = x.softmax(1).mul_(q.sum(1, keepdim=True))
        pairs = [((1 - alpha) * share, p, q)]
        if teacher is not None:
            pairs.append((alpha * T * share, (x / T).softmax(1), (teacher / T).softmax(1)))
        value = sum(factor * (a - b) for factor, a, b in pairs)
        return value, sum(factor * (a + b) for factor, a, b in pairs)


def contender(op: str, way: Way, truth: Truth, direction: str, inputs: Inputs) -> Contender:
    of = calls(way.function, inputs)

    def check() -> None:
        loss, *gradients = of.both(0) if direction == BOTH else (of.forward(0),)
        truth.check(f"{op}, {way.name}", loss, gradients, inputs.grads[0], way.ours)

    return Contender(way.name, of.of(direction), check, way.within, way.may_fail)
