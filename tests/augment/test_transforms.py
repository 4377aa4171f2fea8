"""What transforms draw and what geometry they make of it, beside torchvision's.

torchvision's numbers were recorded, transforms_values.json, and are held here everywhere; where it
is installed, so is the record. Anew:

    python tests/augment/test_transforms.py
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reg_kernels import augment
from reg_kernels._augment_program import WarpFilter
from reg_kernels.augment import _images, policies
from reg_kernels.augment._assemble import Assembly
from reg_kernels.augment._policy_ops import add
from reg_kernels.augment.geometry import _perspective, affine_matrix

RECORD = Path(__file__).with_name("transforms_values.json")
AFFINE = [  # centre from the image's, angle, shift, scale, shears
    ([0.0, 0.0], 30.0, [0.0, 0.0], 1.0, [0.0, 0.0]),
    ([3.5, -2.0], -117.3, [4.0, -1.0], 0.7, [10.0, -7.0]),
    ([-20.0, -15.0], 5.0, [0.0, 9.0], 1.9, [0.0, 33.0]),
]
CORNERS = [[[3, 5], [37, 0], [36, 25], [0, 29]], [[0, 0], [39, 14], [21, 15], [19, 29]]]
SIDES = (30, 40)
UNIFORM = [[((7 * i + 3) * (k + 11) ** 2 % 997) / 997 for k in range(22)] for i in range(24)]
RESIZES: list[dict[str, Any]] = [
    {"size": 17},
    {"size": (9, 50)},
    {"size": 20, "max_size": 23},
    {"size": None, "max_size": 21},
]
CROPS: list[dict[str, Any]] = [
    {"size": 8},
    {"size": 8, "scale": (0.5, 0.9), "ratio": (2.0, 2.5)},
    {"size": 8, "scale": (0.98, 1.0), "ratio": (0.2, 0.3)},
    {"size": 8, "scale": (0.98, 1.0), "ratio": (3.0, 4.0)},
    {"size": 8, "scale": (0.98, 1.0), "ratio": (1.2, 1.25)},
]
SCALES = {
    "RandAugment": (policies.RAND, policies.RAND_OPS, 31),
    "TrivialAugmentWide": (policies.WIDE, policies.RAND_OPS, 31),
    "AutoAugment": (policies.RAND, (*policies.RAND_OPS, "Invert"), 10),
    "AugMix": (policies.MIXED, policies.RAND_OPS[1:], 10),
}


class Fed:
    """Stands for torchvision's draws: uniform numbers and whole ones from lists."""

    def __init__(self, patch: pytest.MonkeyPatch, uniform: list[float], whole: list[float]) -> None:
        self.uniform, self.whole = iter(uniform), iter(whole)
        patch.setattr(Tensor, "uniform_", lambda x, a, b: x.fill_(a + (b - a) * next(self.uniform)))
        patch.setattr(torch, "randint", lambda a, b, size: self._integer(a, b))

    def _integer(self, low: int, high: int) -> Tensor:
        return torch.tensor([low + int(next(self.whole) * (high - low))])


def theirs() -> dict[str, Any]:
    """What torchvision has for all of the above."""
    from torchvision.transforms import functional as F1
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    image = torch.zeros(3, *SIDES)
    found: dict[str, Any] = {
        "affine": [F1._get_inverse_affine_matrix(*case) for case in AFFINE],
        "perspective": [F1._get_perspective_coeffs(_starts(), ends) for ends in CORNERS],
        "expand": [list(F.rotate(image, a, expand=True).shape[1:]) for a in (10.0, 45.0, 90.0)],
        "resize": [list(v2.Resize(**options)(image).shape[1:]) for options in RESIZES],
        "strengths": {},
        "policies": {},
    }
    drawn: dict[str, Any] = {"crop": [], "erase": []}
    for u in UNIFORM:
        with pytest.MonkeyPatch.context() as patch:
            pairs = [x for k in range(10) for x in (u[k], u[10 + k])]
            for options in CROPS:
                Fed(patch, pairs, u[20:])
                got = v2.RandomResizedCrop(**options).make_params([image])
                drawn["crop"].append([got[name] for name in ("top", "left", "height", "width")])
            Fed(patch, pairs, u[20:])
            got = v2.RandomErasing().make_params([image])
            area = [got[name] for name in "ijhw"]
            drawn["erase"].append(area if got["v"] is not None else None)
    for kind, (_, names, bins) in SCALES.items():
        space = getattr(v2, kind)._AUGMENTATION_SPACE
        assert {*names, "Identity"} == {*space, "Identity"}
        strengths = {name: space[name][0](bins, 331, 224) for name in space}
        found["strengths"][kind] = {
            name: x.tolist() for name, x in strengths.items() if x is not None
        }
    for policy in v2.AutoAugmentPolicy:
        found["policies"][policy.value] = v2.AutoAugment(policy)._policies
    return json.loads(json.dumps(found | drawn))


def _starts() -> list[list[int]]:
    h, w = SIDES
    return [[0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]]


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def assembly(samples: int = 1, sides: tuple[int, int] = SIDES, **options: Any) -> Assembly:
    height, width = (torch.full((samples,), float(side), dtype=torch.float64) for side in sides)
    return Assembly(height, width, 3, **options)


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_the_record_is_torchvisions():
    pytest.importorskip("torchvision")
    kept, now = recorded(), theirs()
    for name in ("affine", "perspective"):
        torch.testing.assert_close(torch.tensor(kept.pop(name)), torch.tensor(now.pop(name)))
    assert kept == now


def test_affine_matrices():
    height, width = SIDES
    for (centre, angle, shift, scale, shear), theirs in zip(
        AFFINE, recorded()["affine"], strict=True
    ):
        angles = [math.radians(x) for x in (angle, *shear)]
        centre = [centre[0] + width / 2, centre[1] + height / 2]
        matrix = affine_matrix(*numbers(*angles, scale, *shift, *centre))[0]
        # torchvision's is from the image's centre to the image's centre.
        from_centre = torch.tensor([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]]).double()
        ours = torch.linalg.inv(from_centre) @ matrix @ from_centre
        expected = torch.tensor([*theirs, 0, 0, 1], dtype=torch.float64).view(3, 3)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_perspective_matrices():
    ends, starts = (torch.tensor(x, dtype=torch.float64) for x in (CORNERS, [_starts()] * 2))
    expected = torch.tensor(recorded()["perspective"])
    torch.testing.assert_close(_perspective(ends, starts).view(2, 9)[:, :8].float(), expected)
    # Corners that coincide give no matrix: nothing is done.
    flat = torch.zeros(1, 4, 2, dtype=torch.float64)
    assert torch.equal(_perspective(flat, flat), torch.eye(3).double().expand(1, 3, 3))


@pytest.mark.parametrize(
    ("kind", "name"), [("RandomResizedCrop", "crop"), ("RandomErasing", "erase")]
)
def test_rectangles_are_torchvisions_by_the_same_uniform_numbers(kind, name):
    u = torch.tensor(UNIFORM, dtype=torch.float64).T.contiguous()
    kept = recorded()[name]
    if name == "crop":
        for number, options in enumerate(CROPS):
            drawn = torch.stack(
                [*augment.RandomResizedCrop(**options).draw(u, assembly(len(UNIFORM)))]
            )
            assert drawn.T.tolist() == kept[number :: len(CROPS)]
    else:
        drawn = torch.stack([*augment.RandomErasing().draw(u, assembly(len(UNIFORM)))]).T
        assert any(area is None for area in kept) or len(kept) == len(UNIFORM)
        for ours, area in zip(drawn.tolist(), kept, strict=True):
            assert ours == area if area is not None else ours[2] == 0


def test_sizes():
    kept = recorded()
    for options, size in zip(RESIZES, kept["resize"], strict=True):
        made = assembly()
        augment.Resize(**options).write({}, None, made)
        assert [made.height.item(), made.width.item()] == size
    for angle, size in zip((10.0, 45.0, 90.0), kept["expand"], strict=True):
        made = assembly()
        rotation = augment.RandomRotation((angle, angle), expand=True)
        rotation.write({"angle": numbers(angle)[0]}, None, made)
        assert [made.height.item(), made.width.item()] == size


@pytest.mark.parametrize("kind", SCALES)
def test_strengths_by_bin(kind):
    scale, names, bins = SCALES[kind]
    ours = policies.strengths_by_bin(scale, names, bins)
    kept = recorded()["strengths"][kind]
    for name, strengths in zip(names, ours, strict=True):
        expected = torch.tensor(kept.get(name, [0.0] * bins))
        if name.startswith("Translate"):
            expected = expected.trunc()  # pixels
            strengths = policies.shifts_by_bin(scale, bins, 224.0 if name[-1] == "X" else 331.0)
        assert torch.equal(strengths.float(), expected.float()), name


def test_policies():
    for name, pairs in recorded()["policies"].items():
        kept = [[(op, p, bin or 0.0) for op, p, bin in pair] for pair in pairs]
        assert [[*pair] for pair in policies._POLICIES[name]] == kept


# What geometry does, by what it does to a dot


def dots(samples: int, sides: tuple[int, int] = SIDES) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) with a round dot each, and where, (N, 1, 2)."""
    places = torch.tensor([[15.0 + n % 5, 11.0 + n % 7] for n in range(samples)])
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in sides), indexing="ij")
    far = (x - places[:, :1, None]) ** 2 + (y - places[:, 1:, None]) ** 2
    return torch.exp(-far / 4.5).unsqueeze(1).repeat(1, 3, 1, 1), places.unsqueeze(1)


GEOMETRY = {
    "crop": [augment.RandomResizedCrop((36, 32), scale=(0.5, 1.0)), augment.RandomHorizontalFlip()],
    "flips": [
        augment.RandomHorizontalFlip(p=0.7),
        augment.RandomVerticalFlip(p=0.7),
        augment.RandomCrop((24, 28)),
        augment.RandomResizedCrop((36, 32), scale=(0.6, 1.0)),
    ],
    "pad": [augment.RandomCrop((30, 40), padding=3), augment.RandomVerticalFlip()],
    "affine": [augment.RandomAffine(20, (0.1, 0.1), (0.9, 1.1), 8, interpolation="bilinear")],
    "center": [augment.RandomRotation(25, "bicubic", center=(12, 9)), augment.CenterCrop((28, 36))],
    "perspective": [augment.RandomPerspective(0.3, p=1.0)],
    "fused": [
        augment.RandomHorizontalFlip(),
        augment.RandomRotation(20, "bilinear"),
        augment.RandomVerticalFlip(),
        augment.RandomAffine(10, (0.1, 0.1), interpolation="bilinear"),
        augment.CenterCrop((28, 38)),
    ],
    "expanded": [
        augment.RandomRotation((20, 30), "bilinear", expand=True),
        augment.Resize((40, 44), antialias=False),
    ],
    "policy": [augment.RandAugment(2, 12, interpolation="bilinear"), augment.Resize((33, 40))],
}


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_a_dot_is_where_its_point_and_its_box_say(name, fuse):
    samples = 30 if name == "policy" else 8
    images, points = dots(samples)
    options = {"seed": 3, "backend": "reference", "layout": "NCHW", "fuse_geometry": fuse}
    pipeline = augment.Pipeline(*GEOMETRY[name], **options)
    moved, params = pipeline(images, return_params=True)
    places = pipeline.keypoints(points, params)[:, 0]
    boxes = pipeline.boxes(torch.cat((points - 2, points + 2), 2), params)[:, 0]
    height, width = moved.shape[2:]
    mask = pipeline.apply((images[:, 0] > 0.5).long(), params, fill=9)
    assert mask.dtype == torch.int64 and mask.shape == (samples, height, width)
    y, x = (torch.arange(side) + 0.5 for side in (height, width))
    compared = 0
    for image, (u, v), box, labels, row in zip(
        moved, places, boxes, mask, params.table, strict=True
    ):
        policy = dict(zip(params.columns, row.tolist(), strict=True))
        if any(policy.get(f"RandAugment.op{k}", 0) > 5 for k in (1, 2)):
            continue  # colours are not dots any more
        rim = max(image[0, [0, -1]].max(), image[0][:, [0, -1]].max())
        is_whole = image.max() > 0.7 and rim < 0.02
        if not is_whole:  # part of it is outside
            assert not (9 < u < width - 9 and 9 < v < height - 9)
            continue
        compared += 1
        weight = image[0] / image[0].sum()
        assert abs((weight.sum(0) * x).sum() - u) < 0.25, name
        assert abs((weight.sum(1) * y).sum() - v) < 0.25, name
        ys, xs = (labels == 1).nonzero().T
        assert abs(xs.double().mean() + 0.5 - u) < 0.6 and abs(ys.double().mean() + 0.5 - v) < 0.6
        assert (box[:2] < torch.stack((u, v))).all() and (box[2:] > torch.stack((u, v))).all()
        assert xs.min() >= box[0] - 1 and ys.max() <= box[3] + 1
    assert compared >= 3


def test_warps_in_a_row_bring_back_what_the_first_pushed_out():
    images, _ = dots(2)
    shift = (augment.RandomAffine(0, (0.4, 0.4), interpolation="bilinear"),)
    there = augment.Pipeline(*shift, seed=1, backend="reference", layout="NCHW")
    _, params = there(images, return_params=True)
    rotations = [augment.RandomRotation((a, a), "bilinear") for a in (30, -30)]
    both = augment.Pipeline(*rotations, seed=1, backend="reference", layout="NCHW")
    torch.testing.assert_close(both(images), images, atol=2e-5, rtol=0)
    both.fuse_geometry = False
    assert (both(images) - images).abs().max() > 0.01
    assert params["RandomAffine.translate_x"].abs().max() > 0


def test_crops_pads_and_flips_in_a_row_are_one_instruction():
    made = assembly(4)
    steps = [augment.Pad(2), augment.RandomHorizontalFlip(p=1.0), augment.CenterCrop((20, 24))]
    for step in (*steps, augment.Resize((10, 10))):
        step.write({}, None, made)
    assert made.program().shape[1] == 1
    image = torch.rand(1, 3, *SIDES)
    pipeline = augment.Pipeline(*steps, backend="reference", layout="NCHW")
    plain = torch.nn.functional.pad(image, (2, 2, 2, 2)).flip(3)[:, :, 7:27, 10:34]
    assert torch.equal(pipeline(image), plain)


def test_policies_warps_are_the_other_transforms():
    v = numbers(0.3)[0]
    centre = [SIDES[1] / 2, SIDES[0] / 2]
    for name, given in {
        "ShearX": (0.0, math.atan(0.3), 0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        "ShearY": (0.0, 0.0, math.atan(0.3), 1.0, 0.0, 0.0, 0.0, 0.0),
        "TranslateX": (0.0, 0.0, 0.0, 1.0, 0.3, 0.0, *centre),
        "TranslateY": (0.0, 0.0, 0.0, 1.0, 0.0, 0.3, *centre),
        "Rotate": (-math.radians(0.3), 0.0, 0.0, 1.0, 0.0, 0.0, *centre),
        "AutoContrast": (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, *centre),
    }.items():
        made = assembly(tracks=True)
        op = torch.full((1, 1), float(augment.POLICY_OPS.index(name)), dtype=torch.float64)
        add(made, op, v.view(1, 1), WarpFilter.NEAREST, None)
        expected = affine_matrix(*numbers(*given))
        torch.testing.assert_close(made.seen, expected, rtol=1e-12, atol=1e-12)
        if name != "AutoContrast":
            written = made.program()[0, 0, 1:10].double().view(1, 3, 3)
            torch.testing.assert_close(written, expected, rtol=1e-6, atol=1e-6)


def test_a_quarter_turn_that_expands():
    image = torch.rand(2, 3, *SIDES)
    turn = augment.RandomRotation((90, 90), expand=True)
    made = augment.Pipeline(turn, layout="NCHW")
    result, params = made(image, return_params=True)
    assert torch.equal(result, image.rot90(1, (2, 3)))
    point = made.keypoints(torch.tensor([[[3.0, 5.0]]] * 2), params)
    torch.testing.assert_close(point[0, 0], torch.tensor([5.0, SIDES[1] - 3.0]))


def test_exact_warps_see_the_same_places():
    images, _ = dots(6)
    steps = [augment.RandomAffine(30, (0.1, 0.1), (0.8, 1.2), 9), augment.RandomPerspective(p=1.0)]
    steps.append(augment.RandAugment(1, 20))
    for step in steps:
        options = {"seed": 4, "layout": "NCHW"}
        plain = augment.Pipeline(step, **options)((images * 255).byte()).int()
        exact = augment.Pipeline(step, exact="torchvision", **options)((images * 255).byte()).int()
        assert ((plain - exact).abs() > 2).double().mean() < 2e-3 and plain.float().std() > 5


@pytest.mark.parametrize("kind", ["jitter", "distort"])
def test_colours_are_changed_in_the_order_that_was_drawn(kind):
    step = augment.ColorJitter(0.5, 0.5, 0.5, 0.3)
    if kind == "distort":
        step = augment.RandomPhotometricDistort(hue=(-0.2, 0.2), p=0.7)
    images = torch.rand(30, 3, 6, 7)
    options = {"seed": 1, "layout": "NCHW"}
    result, params = augment.Pipeline(step, **options)(images, return_params=True)
    names = ("brightness", "contrast", "saturation", "hue")
    orders = list(itertools.permutations(range(4)))
    seen = set()
    for image, made, row in zip(images, result, params.table.tolist(), strict=True):
        values = {
            name.split(".")[1]: x for name, x in zip(params.columns[4:], row[4:], strict=True)
        }
        order = orders[int(values.get("order", 0))]
        if kind == "distort":
            order = orders[0] if values["contrast_first"] else (0, 2, 3, 1)
        seen.add(order)
        for number in order:
            factor = values[names[number]]
            if factor != (number < 3):
                single = augment.ColorJitter(**{names[number]: (factor, factor)})
                image = augment.Pipeline(single, **options)(image.unsqueeze(0))[0]
        channels = list(itertools.permutations(range(3)))[int(values.get("permutation", 0))]
        assert torch.equal(made, image[[*channels]])
    assert len(seen) > (12 if kind == "jitter" else 1)


def test_samples_that_nothing_applies_to_have_no_instruction():
    steps = [augment.RandomHorizontalFlip(0.3), augment.RandomRotation(9, p=0.3)]
    made = augment.Pipeline(*steps, augment.RandomVerticalFlip(0.3), seed=1, layout="NCHW")
    packed = _images.packed(torch.zeros(60, 1, 9, 8), "NCHW")
    rows, written = made._assembled(packed, torch.arange(60))
    columns = zip(made._plans[True].columns, rows, strict=True)
    changed = torch.stack([row for name, row in columns if name.endswith("applied")]).any(0)
    program = written.program()
    assert program.shape[1] == 1 and torch.equal(program[:, 0, 0] > 0, changed)
    assert 10 < changed.sum() < 50


def test_cutout_erases_a_clipped_square():
    pipeline = augment.Pipeline(augment.Cutout(9, value=0.5), seed=2, layout="NCHW")
    result, params = pipeline(torch.zeros(40, 3, *SIDES), return_params=True)
    for image, row in zip(result, params.table, strict=True):
        top, left, height, width = row[4:].long().tolist()
        erased = torch.zeros(3, *SIDES)
        erased[:, top : top + height, left : left + width] = 0.5
        assert torch.equal(image, erased) and 4 < height <= 9 and 4 < width <= 9
    assert {9.0} < set(params["Cutout.height"].tolist())


if __name__ == "__main__":
    RECORD.write_text(json.dumps(theirs(), indent=0) + "\n")
