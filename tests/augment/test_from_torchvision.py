"""Pipelines of torchvision's transforms: known by name, and replayed by torchvision where it is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reg_kernels import augment
from reg_kernels.augment import POLICY_OPS


def like(name: str, **attributes: Any) -> Any:
    """An object of a class of that name, as torchvision's transforms look from outside."""
    made = type(name, (), {})()
    vars(made).update(attributes)
    return made


TRAINING = [
    like("ToImage"),
    like(
        "RandomResizedCrop",
        size=(24, 24),
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        interpolation=SimpleNamespace(value="bilinear"),
        antialias=True,
    ),
    like("RandomHorizontalFlip", p=0.5),
    like(
        "RandomApply",
        p=0.8,
        transforms=[
            like(
                "ColorJitter",
                **{"brightness": (0.6, 1.4), "contrast": None},
                **{"saturation": None, "hue": (-0.1, 0.1)},
            )
        ],
    ),
    like("RandomCrop", size=(20, 20), padding=[1, 2, 3, 4], pad_if_needed=False, fill=0,
         padding_mode="reflect"),
    like("ToDtype", dtype=torch.float32, scale=True),
    like("Normalize", mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2], inplace=False),
    like("RandomErasing", p=0.25, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=None, inplace=False),
]  # fmt: skip


def test_transforms_are_known_by_name():
    made = augment.Pipeline.from_torchvision(like("Compose", transforms=TRAINING), seed=1)
    crop, flip, jitter, padded, to_dtype, normalize, erasing = made.transforms
    assert crop.size == (24, 24) and crop.scale == (0.08, 1.0) and flip.p == 0.5
    assert jitter.p == 0.8 and jitter.brightness == (0.6, 1.4) and jitter.contrast is None
    assert padded.padding == (1, 3, 2, 4)  # theirs is left, right, top, bottom
    assert to_dtype.dtype == torch.float32 and normalize.mean == (0.5,) * 3
    assert erasing.value == "random"
    result = made(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    assert result.shape == (2, 3, 20, 20) and result.dtype == torch.float32
    one = augment.Pipeline.from_torchvision(TRAINING[2])
    assert [type(x) for x in one.transforms] == [augment.RandomHorizontalFlip]
    cut = like("Compose", transforms=[TRAINING[2], like("CutMix", alpha=0.7, num_classes=5)])
    mixup = augment.Pipeline.from_torchvision(cut).transforms[-1]
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0, 0.7, 0)
    parts = [like("MixUp", alpha=0.3, num_classes=5), like("CutMix", alpha=0.7, num_classes=5)]
    one_of = like("RandomChoice", transforms=parts, p=[0.25, 0.75])
    mixup = augment.Pipeline.from_torchvision(one_of).transforms[-1]
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob) == (0.3, 0.7, 0.75)
    assert (mixup.mode, mixup.num_classes, mixup.label_smoothing) == ("batch", 5, 0)
    with pytest.raises(ValueError, match="got RandomChoice of other than a CutMix and a MixUp"):
        augment.Pipeline.from_torchvision(like("RandomChoice", transforms=parts[:1], p=[1.0]))


def test_torchvisions_own_objects_are_known():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    compose = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(24),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, hue=0.1)], p=0.8),
            v2.RandomCrop(20, (1, 3, 2, 4), padding_mode="reflect"),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.2] * 3),
            v2.RandomErasing(0.25, value="random"),
        ]
    )
    made = augment.Pipeline.from_torchvision(compose)
    stands_in = augment.Pipeline.from_torchvision(like("Compose", transforms=TRAINING))
    assert repr([*made.transforms]) == repr([*stands_in.transforms])
    others = [
        *(v2.Resize(20), v2.CenterCrop(16), v2.Pad(3), v2.RandomVerticalFlip(), v2.Grayscale(3)),
        *(v2.RandomRotation(9), v2.RandomAffine(9), v2.RandomPerspective(), v2.RandomGrayscale()),
        *(v2.RandomPhotometricDistort(), v2.RandomChannelPermutation(), v2.RandomInvert()),
        *(v2.RandomAutocontrast(), v2.RandomEqualize(), v2.RandomSolarize(128)),
        *(v2.RandomPosterize(4), v2.RandomAdjustSharpness(2), v2.GaussianBlur(5)),
        *(v2.GaussianNoise(), v2.RandAugment(), v2.TrivialAugmentWide(), v2.AugMix()),
        v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    ]
    kinds = [
        type(x).__name__ for x in augment.Pipeline.from_torchvision(v2.Compose(others)).transforms
    ]
    assert kinds == [type(x).__name__ for x in others]


def test_what_cannot_be_taken_is_named():
    inner = like("RandomApply", transforms=[TRAINING[2], TRAINING[2]], p=0.5)
    lanczos = like("Resize", size=[8], interpolation="lanczos", max_size=None, antialias=True)
    unscaled = like("ToDtype", dtype=torch.float32, scale=False)
    parts = [like("ElasticTransform"), TRAINING[2], inner, lanczos, unscaled, like("FiveCrop")]
    with pytest.raises(ValueError) as error:
        augment.Pipeline.from_torchvision(like("Compose", transforms=parts))
    message = str(error.value)
    assert message.startswith("Pipeline.from_torchvision: compose must be made of transforms that")
    for name in ("ElasticTransform", "RandomApply of", "Resize (", "ToDtype without", "FiveCrop"):
        assert name in message
    assert "RandomHorizontalFlip" not in message


def test_random_apply():
    images = torch.randint(0, 256, (200, 3, 3, 5), dtype=torch.uint8)
    dark = like(
        *("RandomPhotometricDistort",),
        **{"brightness": (0.5, 0.5), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)},
        p=1.0,
    )
    for p, least, most in ((0.0, 1.0, 1.0), (0.25, 0.6, 0.9)):
        applied = like("RandomApply", transforms=[dark], p=p)
        made = augment.Pipeline.from_torchvision(applied, seed=0, layout="NCHW")
        kept = (made(images) == images).flatten(1).all(1).double().mean()
        assert least <= kept <= most
    gray = like("RandomApply", transforms=[like("Grayscale", num_output_channels=1)], p=0.5)
    with pytest.raises(ValueError, match=r"Grayscale: p must be 1 with one channel, got 0\.5"):
        augment.Pipeline.from_torchvision(gray)


# Replayed by torchvision itself, from the parameters that we drew


class Replay:
    def __init__(self) -> None:
        self.v2 = pytest.importorskip("torchvision.transforms.v2")
        self.F = self.v2.functional

    def mode(self, name: str) -> Any:
        return self.v2.InterpolationMode(name)

    def affine(self, x: Tensor, r: dict[str, float]) -> Tensor:
        shift = [int(r["translate_x"]), int(r["translate_y"])]
        shear = [r["shear_x"], r["shear_y"]]
        options = {"interpolation": self.mode("bilinear"), "fill": 7, "center": [10, 20]}
        return self.F.affine(x, r["angle"], shift, r["scale"], shear, **options)

    def rotate(self, x: Tensor, r: dict[str, float]) -> Tensor:
        return self.F.rotate(x, r["angle"])

    def perspective(self, x: Tensor, r: dict[str, float]) -> Tensor:
        h, w = x.shape[1:]
        ends = [[int(r[f"{axis}{k}"]) for axis in "xy"] for k in range(4)]
        starts = [[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]]
        return self.F.perspective(x, starts, ends, fill=3)

    def crop(self, x: Tensor, r: dict[str, float]) -> Tensor:
        region = [int(r[name]) for name in ("top", "left", "height", "width")]
        return self.F.resized_crop(x, *region, [24, 30], antialias=True)

    def jitter(self, x: Tensor, r: dict[str, float]) -> Tensor:
        names = ("brightness", "contrast", "saturation", "hue")
        for k in list(itertools.permutations(range(4)))[int(r["order"])]:
            x = getattr(self.F, f"adjust_{names[k]}")(x, r[names[k]])
        return x

    def policy(self, x: Tensor, r: dict[str, float]) -> Tensor:
        steps = sum(name.startswith("op") for name in r)
        for k in range(1, steps + 1):
            x = self._step(x, r[f"op{k}"], r[f"strength{k}"], "nearest")
        return x

    def mix(self, x: Tensor, r: dict[str, float]) -> Tensor:
        total = torch.tensor(r["original"]) * x
        for chain in range(3):
            y = x
            for k in range(3 * chain + 1, 3 * chain + 4):
                y = self._step(y, r[f"op{k}"], r[f"strength{k}"], "bilinear")
            total = total + torch.tensor(r[f"weight{chain + 1}"]) * y
        return total.to(x.dtype)

    def _step(self, x: Tensor, op: float, strength: float, mode: str) -> Tensor:
        name = POLICY_OPS[int(op)]
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):
            strength -= 1
        does = self.v2.RandAugment()._apply_image_or_video_transform
        return does(x, name, strength, self.mode(mode), {Tensor: None})


REPLAYS = {
    "affine": (
        augment.RandomAffine(
            30, (0.2, 0.1), (0.7, 1.4), (-20, 20, -10, 10), "bilinear", 7, (10, 20)
        ),
        1,
    ),
    "rotate": (augment.RandomRotation(40), 0),
    "perspective": (augment.RandomPerspective(0.6, p=0.999), 1),
    "crop": (augment.RandomResizedCrop((24, 30)), 1),
    "jitter": (augment.ColorJitter(0.5, 0.5, 0.5, 0.3), 0),
    "policy": (augment.RandAugment(3, 20), 0),
    "mix": (augment.AugMix(), 1),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_exact_is_torchvisions(name):
    replay = Replay()
    transform, within = REPLAYS[name]
    if name == "perspective":
        transform = augment.RandomPerspective(0.6, p=1.0, fill=3)
    coarse = torch.rand(40, 3, 9, 11, generator=torch.Generator().manual_seed(1)) * 255
    batch = torch.nn.functional.interpolate(coarse, (47, 53), mode="bicubic").clamp(0, 255).byte()
    made = augment.Pipeline(transform, seed=5, exact="torchvision", layout="NCHW")
    ours, params = made(batch, return_params=True)
    names = [column.split(".")[-1] for column in params.columns]
    for image, mine, row in zip(batch, ours, params.table.tolist(), strict=True):
        theirs = getattr(replay, name)(image, dict(zip(names, row, strict=True)))
        beyond = ((theirs.int() - mine.int()).abs() > within).double().mean()
        # A level that a bilinear warp is off by may be many after an Equalize.
        assert beyond <= (2e-3 if name == "mix" else 0)
