"""Benchmarks of image augmentation: a batch of bytes to what a net takes, drawing included.

Bytes a sample: the image's region is read once, at most a byte a value, and the result is written
once; what lies between stays in the caches. Counted is the whole image, whatever the crop needs.

torchvision, kornia and AlbumentationsX do the same by their own classes, and OpenCV the affine map
alone; each where it is installed. torchvision draws once for a batch, the others for each image.
The first two take the batch, as floats where they need them; the others take one image after the
other, and their results are stacked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import augment
from ._measure import FORWARD, Benchmark, Contender, Goal, Scope, Skipped, WrongValues
from ._peers import peer
from ._ways import our_ways

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, CROP = 256, 224
TORCHVISION, KORNIA, ALBUMENTATIONS, OPENCV = "torchvision", "kornia", "albumentationsx", "opencv"
_MODULES = {
    TORCHVISION: "torchvision.transforms.v2",
    KORNIA: "kornia.augmentation",
    ALBUMENTATIONS: "albumentations",
    OPENCV: "cv2",
}


class Kind(NamedTuple):
    """What is done to a batch."""

    variant: str
    batch: int
    ours: Callable[[], list[Any]]  # transforms
    peers: dict[str, Callable[[Any], Callable[[Tensor], object]]]  # of the peer's module
    goals: tuple[Goal, ...] = ()
    side: int = CROP  # of the result
    to_bytes: bool = False  # which the others' results are as well


def _faster(limit: float, than: str) -> Goal:
    text = f"at least {limit:g} times {than}'s speed"
    return Goal("native", text, f"speedup_over_{than}", limit, True)


_COPY = Goal("native", "at most 3 times a copy of its bytes", "time_over_copy", 3.0)


def _floats(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div_(255)


def of_torchvision(make: Callable[[Any], list[Any]]) -> Callable[[Any], Any]:
    """Transforms of a batch (N, C, H, W) of bytes, as its users compose them."""

    def prepare(v2: Any) -> Callable[[Tensor], object]:
        compose = v2.Compose(make(v2))
        return lambda images: compose(images.permute(0, 3, 1, 2))

    return prepare


def of_kornia(make: Callable[[Any], list[Any]]) -> Callable[[Any], Any]:
    def prepare(module: Any) -> Callable[[Tensor], object]:
        sequence = torch.nn.Sequential(*make(module))
        return lambda images: sequence(_floats(images))

    return prepare


def _of_albumentations(make: Callable[[Any], list[Any]]) -> Callable[[Any], Any]:
    """One image after the other, as arrays; the results as one batch."""

    def prepare(module: Any) -> Callable[[Tensor], object]:
        import numpy as np

        compose = module.Compose(make(module))

        def run(images: Tensor) -> Tensor:
            arrays = [compose(image=image)["image"] for image in images.numpy()]
            return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

        return run

    return prepare


def _of_opencv(cv2: Any) -> Callable[[Tensor], object]:
    """The affine map of each image by the matrix that was drawn for it."""
    import numpy as np

    rng = np.random.default_rng(0)

    def run(images: Tensor) -> Tensor:
        arrays = []
        for image in images.numpy():
            angle, scale = rng.uniform(-30, 30), rng.uniform(0.8, 1.2)
            matrix = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, scale)
            matrix[:, 2] += rng.uniform(-0.1, 0.1, 2) * SIDE
            arrays.append(cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR))
        return torch.from_numpy(np.stack(arrays))

    return run


def to_floats(v2: Any) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


_JITTER = (0.4, 0.4, 0.4, 0.1)
_AFFINE: dict[str, Any] = {"translate": (0.1, 0.1), "scale": (0.8, 1.2)}

KINDS = (
    Kind(
        "crop, flip, normalise",
        256,
        lambda: [
            augment.RandomResizedCrop(CROP),
            augment.RandomHorizontalFlip(),
            augment.Normalize(MEAN, STD),
        ],
        {
            TORCHVISION: of_torchvision(
                lambda v2: [
                    v2.RandomResizedCrop(CROP, antialias=True),
                    v2.RandomHorizontalFlip(),
                    *to_floats(v2),
                ]
            ),
            KORNIA: of_kornia(
                lambda k: [
                    k.RandomResizedCrop((CROP, CROP)),
                    k.RandomHorizontalFlip(),
                    k.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
                ]
            ),
            ALBUMENTATIONS: _of_albumentations(
                lambda a: [
                    a.RandomResizedCrop((CROP, CROP)),
                    a.HorizontalFlip(),
                    a.Normalize(MEAN, STD),
                ]
            ),
        },
        (_faster(8, KORNIA), _faster(8, TORCHVISION), _faster(2, ALBUMENTATIONS), _COPY),
    ),
    Kind(
        "affine, bilinear, to bytes",
        32,
        lambda: [augment.RandomAffine(30, interpolation="bilinear", **_AFFINE)],
        {
            TORCHVISION: of_torchvision(
                lambda v2: [
                    v2.RandomAffine(30, interpolation=v2.InterpolationMode.BILINEAR, **_AFFINE)
                ]
            ),
            KORNIA: of_kornia(lambda k: [k.RandomAffine(30.0, p=1.0, **_AFFINE)]),
            ALBUMENTATIONS: _of_albumentations(
                lambda a: [
                    a.Affine(scale=(0.8, 1.2), translate_percent=(-0.1, 0.1), rotate=(-30, 30), p=1)
                ]
            ),
            OPENCV: _of_opencv,
        },
        (_faster(8, KORNIA), _faster(1, OPENCV)),
        SIDE,
        to_bytes=True,
    ),
    Kind(
        "colour jitter, to bytes",
        32,
        lambda: [augment.ColorJitter(*_JITTER)],
        {
            TORCHVISION: of_torchvision(lambda v2: [v2.ColorJitter(*_JITTER)]),
            KORNIA: of_kornia(lambda k: [k.ColorJitter(*_JITTER, p=1.0)]),
            ALBUMENTATIONS: _of_albumentations(
                lambda a: [a.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1)]
            ),
        },
        (_faster(20, TORCHVISION), _faster(2, ALBUMENTATIONS)),
        SIDE,
        to_bytes=True,
    ),
    Kind(
        "blur of 23, to bytes",
        32,
        lambda: [augment.GaussianBlur(23)],
        {
            TORCHVISION: of_torchvision(lambda v2: [v2.GaussianBlur(23)]),
            KORNIA: of_kornia(lambda k: [k.RandomGaussianBlur((23, 23), (0.1, 2.0), p=1.0)]),
            ALBUMENTATIONS: _of_albumentations(
                lambda a: [a.GaussianBlur(blur_range=(23, 23), sigma_range=(0.1, 2.0), p=1)]
            ),
        },
        (_faster(4, TORCHVISION),),
        SIDE,
        to_bytes=True,
    ),
    Kind(
        "whole pipeline",
        32,
        lambda: [
            augment.RandomResizedCrop(CROP),
            augment.RandomHorizontalFlip(),
            augment.RandAugment(2, 9),
            augment.ColorJitter(*_JITTER),
            augment.Normalize(MEAN, STD),
            augment.RandomErasing(0.25),
        ],
        {
            TORCHVISION: of_torchvision(
                lambda v2: [
                    v2.RandomResizedCrop(CROP, antialias=True),
                    v2.RandomHorizontalFlip(),
                    v2.RandAugment(2, 9),
                    v2.ColorJitter(*_JITTER),
                    *to_floats(v2),
                    v2.RandomErasing(0.25),
                ]
            ),
            KORNIA: of_kornia(
                lambda k: [
                    k.RandomResizedCrop((CROP, CROP)),
                    k.RandomHorizontalFlip(),
                    k.auto.RandAugment(2, 9),
                    k.ColorJitter(*_JITTER, p=1.0),
                    k.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
                    k.RandomErasing(p=0.25),
                ]
            ),
        },
        (_faster(6, KORNIA), _faster(6, TORCHVISION)),
    ),
)


def cases(scope: Scope) -> list[Benchmark]:
    """Each kind of pipeline, to float32, and the first to 16 bits as well."""
    return [case(kind, dtype) for dtype in scope.brief for kind in KINDS]


def sized(scope: Scope, elements: int) -> list[Benchmark]:
    """Points of growth curves: 16 square images of three channels."""
    side = math.isqrt(elements // 16)
    kind = KINDS[2]._replace(batch=16, side=side, goals=(), peers={})
    return [case(kind, torch.float32, side)]


def case(kind: Kind, dtype: torch.dtype, side: int = SIDE) -> Benchmark:
    def prepare(device: torch.device, pool: int) -> Sequence[Contender | Skipped]:
        generator = torch.Generator().manual_seed(0)
        shape = (kind.batch, side, side, 3)
        batches = [
            torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
            for _ in range(pool)
        ]

        def make(backend: str | None) -> augment.Pipeline:
            result = torch.uint8 if kind.to_bytes else dtype
            return augment.Pipeline(*kind.ours(), dtype=result, seed=0, backend=backend)

        entries: list[Contender | Skipped] = []
        for way in our_ways("augment", make, device, torch.float32, math.prod(shape)):
            if isinstance(way, Skipped):
                entries.append(way)
                continue
            check = functools.partial(
                _check, f"augment, {way.name}", way.function, batches[0], kind
            )
            call = functools.partial(_run, way.function, batches)
            entries.append(Contender(way.name, call, check, way.within))
        if device.type == "cpu":
            entries += [_peer(name, of, batches[0]) for name, of in kind.peers.items()]
        return entries

    size = 1 if kind.to_bytes else dtype.itemsize
    moved = kind.batch * 3 * (side * side + kind.side * kind.side * size)
    return Benchmark(
        op="augment",
        variant=kind.variant,
        direction=FORWARD,
        dtype=dtype,
        shape=(kind.batch, 3, kind.side, kind.side),
        bytes=moved,
        prepare=prepare,
        requires_grad=False,
        peers=tuple(kind.peers),
        goals=kind.goals if dtype == torch.float32 else (),
        items=kind.batch,
        unit="images",
    )


def _run(pipeline: augment.Pipeline, batches: list[Tensor], i: int) -> Tensor:
    images: Tensor = pipeline(batches[i % len(batches)])
    return images


def _check(name: str, pipeline: augment.Pipeline, images: Tensor, kind: Kind) -> None:
    """Raises WrongValues unless a few images come out as the reference has them, to a rounding."""
    few, indices = images[:2], range(2)
    plain = augment.Pipeline(
        *kind.ours(), dtype=pipeline.dtype, seed=pipeline.seed, backend="reference"
    )
    actual, expected = pipeline(few, indices=indices), plain(few, indices=indices)
    if not torch.equal(actual, expected):
        error = (actual.double() - expected.double()).abs().max()
        raise WrongValues(f"{name} is off by {float(error):.2e} from the reference")


def _peer(name: str, make: Callable[[Any], Any], images: Tensor) -> Contender | Skipped:
    module = peer(name, _MODULES[name], remedy="bench/augmentation.py says how to")
    if isinstance(module, Skipped):
        return module
    run = make(module)

    def check() -> None:
        result = run(images[:2])
        if len(result) != 2:
            raise WrongValues(f"augment, {name}: {len(result)} images of 2")

    return Contender(name, lambda i: run(images), check, may_fail=True)
