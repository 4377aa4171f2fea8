"""Benchmarks of whole models: a training step, images a second and memory.

A step is forward, loss, backward, the optimizer's step and the freeing of the gradients, always on
the same batch. "eager" is PyTorch's layers and `torch.optim.AdamW` as people write it: with
`fused=True` on a GPU and by its defaults, a loop over the parameters, on the CPU. Ours is
`reg_kernels.convert(model, fuse=True)` of the same weights with `reg_kernels.optim.AdamW`, by the
backend that is chosen automatically. Both have PyTorch's convolutions, matrix products and loss,
which take most of the time. The question is whether the rest gets faster in their company, too.

Of the deep nets ours is `nn.StochasticDepthBlock` around each branch at p = 0.5, with PyTorch's
layers and optimizer otherwise, and eager is the net that skips nothing: what is asked is how much
time stochastic depth saves.

Shapes: images (N, C, H, W), labels (N,).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reg_kernels
from reg_kernels import backends, bench, optim
from reg_kernels.bench._measure import EAGER, STEP
from reg_kernels.bench._ways import in_layout
from reg_kernels.cli._trainer.models import build_model
from reg_kernels.nn import StochasticDepthBlock
from reg_kernels.training import Recipe

# The check compares losses after steps that move the weights. The timed steps hardly move them:
# hundreds of real steps on one batch would lead to gradients of 0, whose squares are denormal.
STEPS_CHECKED = 3
LR_CHECKED, LR_TIMED = 2e-5, 1e-6
_IMAGES_CHECKED = 16  # the truth is in float64, which a GPU takes its time for


class _Allowed(NamedTuple):
    """How far roundings may move a loss: by a share of it and, after the first step, by a share of
    its fall since then.

    AdamW's first steps follow the sign of a gradient, and the roundings of a ResNet's few values a
    channel turn signs and close relus. Measured with a ResNet-50, with PyTorch's layers as with
    ours: 1 % of the fall in float32 and 40 % in bfloat16 by autocast, and 2e-6 and 0.9 % of the
    loss itself. A step that is not taken at all makes 100 % of the fall.
    """

    of_loss: float
    of_fall: float


_ALLOWED = {torch.float32: _Allowed(1e-4, 0.05), torch.bfloat16: _Allowed(4e-2, 0.6)}
_ALLOWED_TF32 = _Allowed(5e-3, 0.2)  # 10 bits, which PyTorch's convolutions have on a GPU


class _Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class _Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.norm1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """K. He et al., "Deep residual learning for image recognition", CVPR 2016, table 1.

    A bottleneck's stride is in its 3x3 convolution, as is usual since. Weights by kaiming_normal_.
    """

    def __init__(
        self, block: type[_Basic] | type[_Bottleneck], blocks: Sequence[int], classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv, self.norm = _conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = 64, []
        for stage, count in enumerate(blocks):
            width, row = 64 << stage, []
            for index in range(count):
                row.append(block(channels, width, 2 if stage > 0 and index == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*row))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(images))))
        return self.head(self.stages(x).mean((2, 3)))


def resnet18(classes: int = 1000) -> ResNet:
    return ResNet(_Basic, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    return ResNet(_Bottleneck, (3, 4, 6, 3), classes)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if (inputs, stride) == (outputs, 1):
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class _Deep(nn.Module):
    """A block of two 3x3 convolutions and its shortcut, with nothing behind their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(width, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _conv(width, width, 3),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def deep() -> nn.Sequential:
    """24 such blocks of 32 channels."""
    blocks = [_Deep(32) for _ in range(24)]
    return nn.Sequential(
        *(_conv(3, 32, 3), *blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(32, 10),
    )


def skipping(mode: str, model: nn.Module) -> nn.Module:
    """A copy of it that skips half of its branches, or the branches of half of the samples."""
    model = copy.deepcopy(model)
    for index, block in enumerate(model):  # type: ignore[arg-type]  # an nn.Sequential
        if isinstance(block, _Deep):
            model[index] = StochasticDepthBlock(block.branch, 0.5, mode)  # type: ignore[operator]
    return model


class Net(NamedTuple):
    """A model and the batches that it is trained with; what ours is made of, and what is asked."""

    name: str
    make: Callable[[], nn.Module]
    classes: int
    batch: tuple[int, ...]
    batch_gpu: tuple[int, ...]
    ours: Callable[[nn.Module], nn.Module] | None = None  # by default `converted`, with our AdamW
    speedup: float = 1

    def shape(self, device: torch.device) -> tuple[int, ...]:
        return self.batch_gpu if device.type == "cuda" else self.batch


_DIGITS, _CLASSES = (Recipe.batch_size, 1, 8, 8), 10  # what `reg-kernels train` is about by default
_PHOTOS = (128, 3, 224, 224)


def _demo() -> nn.Module:
    return build_model(Recipe(dropout=0.5), _DIGITS[1:], _CLASSES, nn.Dropout)


NETS = (
    Net("demo", _demo, _CLASSES, _DIGITS, _DIGITS),
    Net("resnet18", resnet18, 1000, (32, 3, 64, 64), _PHOTOS),
    Net("resnet50", resnet50, 1000, (16, 3, 64, 64), _PHOTOS),
    *(
        Net(
            f"deep, {mode} skipped",
            deep,
            classes=10,
            batch=(32, 3, 16, 16),
            batch_gpu=(256, 3, 32, 32),
            ours=functools.partial(skipping, mode),
            speedup=1.3,
        )
        for mode in ("batch", "subset")
    ),
)
_GPU_MEMORY = 40 * 2**30  # bytes that a GPU must have for the batches of photos


def cases(scope: bench.Scope) -> list[bench.Benchmark]:
    """A step of each net by layout and, on a GPU, also in bfloat16 by autocast."""
    return [_case(scope.device, *point) for point in _points(scope)]


Point = tuple[Net, torch.dtype, str]  # the last: the layout


def _points(scope: bench.Scope) -> Iterator[Point]:
    on_gpu = scope.device.type == "cuda"
    dtypes = (torch.float32, torch.bfloat16) if on_gpu or scope.everything else (torch.float32,)
    dtypes = tuple(dtype for dtype in dtypes if dtype in scope.dtypes)
    demo, *resnets = (net for net in NETS if net.ours is None)
    if torch.float32 in dtypes:
        for net in (demo, *(net for net in NETS if net.ours is not None)):
            yield net, torch.float32, "contiguous"
    if on_gpu and torch.cuda.get_device_properties(scope.device).total_memory < _GPU_MEMORY:
        return
    both = scope.everything or not on_gpu
    layouts = ("contiguous", "channels_last") if both else ("channels_last",)
    yield from itertools.product(resnets, dtypes, layouts)


def _case(device: torch.device, net: Net, dtype: torch.dtype, layout: str) -> bench.Benchmark:
    """A step of `net`; in another dtype than float32 by autocast, the weights staying float32."""
    shape = net.shape(device)
    with backends.backend(None):
        ours = backends.choose("batch_norm", device.type, dtype)

    def prepare(device: torch.device, pool: int) -> Sequence[bench.Contender | bench.Skipped]:
        images = in_layout(torch.randn(shape, device=device), layout)
        labels = torch.randint(net.classes, shape[:1], device=device)
        model = net.make().to(device)
        if layout == "channels_last":
            model.to(memory_format=torch.channels_last)
        truth = Truth(model, images[:_IMAGES_CHECKED], labels[:_IMAGES_CHECKED], dtype)
        fused = {"fused": True} if device.type == "cuda" else {}
        eager = functools.partial(torch.optim.AdamW, **fused)
        made = (converted, optim.AdamW) if net.ours is None else (net.ours, eager)
        return [
            _contender(ours, Stepper(truth, images, labels, *made)),
            _contender(EAGER, Stepper(truth, images, labels, copy.deepcopy, eager)),
        ]

    return bench.Benchmark(
        op="model",
        variant=net.name if dtype == torch.float32 else f"{net.name} autocast",
        direction=STEP,
        dtype=dtype,
        shape=shape,
        bytes=None,
        prepare=prepare,
        layout=layout,
        wall=True,  # small kernels by the hundred: the host's time is in a step's
        items=shape[0],
        unit="images",
        goals=(
            bench.Goal(
                ours,
                "at least level with eager"
                if net.speedup == 1
                else f"at least {net.speedup:g} times eager's speed",
                *("speedup_over_eager", net.speedup, True),
            ),
        ),
    )


def converted(model: nn.Module) -> nn.Module:
    """A copy of `model` with our layers, its chains fused."""
    return reg_kernels.convert(model, fuse=True)


def _contender(name: str, stepper: Stepper) -> bench.Contender:
    return bench.Contender(name, lambda i: stepper.step(), functools.partial(stepper.check, name))


class Stepper:
    """A model of its own, made from the truth's, in training on one batch."""

    def __init__(
        self,
        truth: Truth,
        images: Tensor,
        labels: Tensor,
        make: Callable[[nn.Module], nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
    ) -> None:
        self._truth, self._images, self._labels = truth, images, labels
        self._make, self._new_optimizer = make, optimizer

    def _begin(self, lr: float) -> None:
        self._model = self._make(self._truth.model)
        self._optimizer = self._new_optimizer(self._model.parameters(), lr=lr)

    def step(self) -> None:
        self._step(self._images, self._labels)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step, which returns the loss before it."""
        with self._truth.precision():
            loss = F.cross_entropy(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        # Last and not first, which costs the same: a step's peak of memory then holds gradients.
        self._optimizer.zero_grad()
        return loss.detach()

    def check(self, name: str) -> None:
        """Raises WrongValues unless STEPS_CHECKED steps have the losses that they should, dropout
        apart; leaves a model with dropout that takes small steps."""
        self._begin(LR_CHECKED)
        without_dropout(self._model)
        batch = self._truth.batch
        self._truth.check(name, [self._step(*batch) for _ in range(STEPS_CHECKED)])
        self._begin(LR_TIMED)


class Truth:
    """A model at its start, and the losses of its first steps in float64, without dropout."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> None:
        self.model, self.batch = model, (images, labels)
        self._dtype = dtype

    def precision(self) -> torch.autocast:
        """The context that a forward runs in."""
        enabled = self._dtype != torch.float32
        return torch.autocast(self.batch[0].device.type, self._dtype, enabled=enabled)

    @functools.cached_property
    def _losses(self) -> list[float]:
        model = without_dropout(copy.deepcopy(self.model).double())
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR_CHECKED)
        images, labels = self.batch
        losses = []
        for _ in range(STEPS_CHECKED):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.double()), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def check(self, name: str, losses: Sequence[Tensor]) -> None:
        """Raises WrongValues unless the losses are right to roundings."""
        on_gpu = self.batch[0].device.type == "cuda"
        of_loss, of_fall = _ALLOWED[self._dtype]
        if on_gpu and self._dtype == torch.float32:
            of_loss, of_fall = _ALLOWED_TF32
        for number, (loss, wanted) in enumerate(zip(losses, self._losses, strict=True), start=1):
            allowed = of_loss * wanted + of_fall * abs(self._losses[0] - wanted)
            if not abs(loss.item() - wanted) <= allowed:
                raise bench.WrongValues(
                    f"model, {name}: the loss of step {number} is {loss.item():.5g}, "
                    f"must be {wanted:.5g} to within {allowed:.2g}"
                )


def without_dropout(model: nn.Module) -> nn.Module:
    """`model` itself, with every dropout's p at 0, and every branch's that is skipped."""
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, StochasticDepthBlock)):
            module.p = 0.0
    return model
