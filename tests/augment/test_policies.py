"""Policies: how often they choose what, and timm's strings."""

from __future__ import annotations

import math

import pytest
import torch

from reg_kernels import augment
from reg_kernels.augment import POLICY_OPS, policies
from reg_kernels.augment import timm as strings
from reg_kernels.augment._assemble import Assembly
from reg_kernels.augment._policy_ops import NUMBER

SAMPLES = 6000


def drawn(transform, samples=SAMPLES):
    """The parameters that a policy draws for many small images, by name, and its steps."""
    made = augment.Pipeline(transform, seed=11, layout="NCHW")
    rows, _ = made._assembled(_batch(samples), torch.arange(samples))
    columns = (name.split(".")[-1] for name in made._plans[True].columns)
    values = dict(zip(columns, rows, strict=True))
    steps = sum(name.startswith("op") for name in values)
    return values, steps


def _batch(samples):
    from reg_kernels.augment._images import Batch

    images = torch.tensor([[0, 40, 60]]).repeat(samples, 1)
    return Batch(torch.zeros(7200, dtype=torch.uint8), images, 3, False, False, (40, 60))


def shares(values, name):
    """How often each operation is at one step."""
    counts = torch.bincount(values[name].long(), minlength=len(POLICY_OPS)).double()
    return dict(zip(POLICY_OPS, (counts / len(values[name])).tolist(), strict=True))


def near(share, expected):
    return abs(share - expected) < 4.5 * math.sqrt(max(expected, 1e-4) / SAMPLES)


@pytest.mark.parametrize("transform", [augment.RandAugment(2, 9), augment.TrivialAugmentWide()])
def test_each_operation_is_as_likely(transform):
    values, steps = drawn(transform)
    for step in range(1, steps + 1):
        found = shares(values, f"op{step}")
        assert all(near(found[name], 1 / 14) for name in policies.RAND_OPS)
    strengths = values["strength1"][values["op1"] == NUMBER["Rotate"]]
    if steps == 2:
        assert set(strengths.tolist()) == {-9.0, 9.0}
        assert near((strengths > 0).double().mean() / 14, 1 / 28)
        pairs = values["op1"] * 100 + values["op2"]
        assert len(pairs.unique()) == 14**2
    else:
        assert len(strengths.unique()) == 61 and strengths.abs().max() == 135


def test_autoaugment_chooses_pairs_and_does_each_with_its_probability():
    values, _ = drawn(augment.AutoAugment("svhn"))
    expected: dict[tuple[int, str], float] = {}
    for pair in policies._POLICIES["svhn"]:
        for step, (name, p, _) in enumerate(pair, 1):
            expected[step, name] = expected.get((step, name), 0) + p / 25
    for (step, name), share in expected.items():
        assert near(shares(values, f"op{step}")[name], share)
    bits, _ = drawn(augment.AutoAugment("imagenet"))
    kept = bits["strength1"][bits["op1"] == NUMBER["Posterize"]]
    assert set(kept.tolist()) == {4.0, 5.0, 6.0}  # bins 8, 7 and 5, and 4 bits of bin 8


def test_augmix_weights_are_dirichlets():
    values, steps = drawn(augment.AugMix(alpha=0.7, mixture_width=2), 3000)
    weights = torch.stack([values[name] for name in ("original", "weight1", "weight2")])
    torch.testing.assert_close(weights.sum(0), torch.ones(3000, dtype=torch.float64))
    original = weights[0]
    assert abs(original.mean() - 0.5) < 0.03
    assert abs(original.var() - 1 / (4 * 2.4)) < 0.01  # Beta(a, a): 1 / (4 (2 a + 1))
    share = weights[1] / (1 - original)
    assert abs(share.var() - 1 / (4 * 2.4)) < 0.01
    assert abs(torch.corrcoef(torch.stack((share, original)))[0, 1]) < 0.07
    assert steps == 6
    depth = torch.stack([values[f"op{k}"] for k in range(1, 4)]).bool().sum(0)
    assert torch.allclose(torch.bincount(depth)[1:] / 3000, torch.tensor(1 / 3), atol=0.04)
    fixed, _ = drawn(augment.AugMix(chain_depth=2), 50)
    assert all((fixed[f"op{k}"] > 0).all() for k in range(1, 7))


def test_three_augment_is_one_of_three():
    values, _ = drawn(augment.ThreeAugment())
    found = shares(values, "op1")
    assert all(near(found[name], 1 / 3) for name in ("Color", "Solarize", "GaussianBlur"))
    sigma = values["strength1"][values["op1"] == NUMBER["GaussianBlur"]]
    assert sigma.min() >= 0.1 and 1.95 < sigma.max() <= 2 and abs(sigma.mean() - 1.05) < 0.05
    rest = values["strength1"][values["op1"] != NUMBER["GaussianBlur"]]
    assert set(rest.tolist()) == {0.0, 128 / 255}


def test_gray_images_have_no_colour_to_change():
    batch = torch.randint(0, 256, (40, 1, 9, 9), dtype=torch.uint8)
    for transform in (augment.RandAugment(), augment.ColorJitter(0.5, 0.5, 0.5, 0.5)):
        result = augment.Pipeline(transform, seed=1, layout="NCHW")(batch)
        assert result.shape == batch.shape and not torch.equal(result, batch)


# timm

SIZE = {"height": torch.tensor([50.0]).double(), "width": torch.tensor([80.0]).double()}
# Of a level and a positive sign, what timm 1.0.31 hands its operation.
LEVELS = {
    "Rotate": {0: 0, 9: 27, 10: 30},
    "ShearX": {9: 0.27},
    "TranslateXRel": {9: 0.405 * 80},
    "TranslateYRel": {10: 0.45 * 50},
    "Posterize": {0: 1, 2.4: 1, 2.6: 1, 7.5: 3, 10: 4},  # timm: 0 at 2.4 and below
    "PosterizeIncreasing": {0: 4, 2.4: 4, 9: 1, 10: 1},  # timm: 0 at 10
    "PosterizeOriginal": {0: 4, 9: 7, 10: 8},
    "Solarize": {0: 0, 5: 128 / 255, 9: 230 / 255, 10: 256 / 255},
    "SolarizeIncreasing": {0: 256 / 255, 9: 26 / 255, 10: 0},
    "SolarizeAdd": {9: 99 / 255, 10: 110 / 255},
    "Color": {0: 0.1, 9: 1.72},
    "SharpnessIncreasing": {0: 1, 9: 1.81},
    "Desaturate": {0: 0.5, 10: 0},
    "GaussianBlur": {0: 0.1, 10: 2},
    "GaussianBlurRand": {10: 0.1 + 1.9 * 0.25},
}


@pytest.mark.parametrize("name", LEVELS)
def test_strengths_of_levels(name):
    step = strings.TimmAugment("", (name,), 1, p=1.0, interpolation="bilinear")
    u = torch.full((6, 1, 1), 0.25, dtype=torch.float64)
    u[3] = 0.8  # positive
    choice = torch.zeros(1, 1, dtype=torch.int64)
    for level, expected in LEVELS[name].items():
        _, strength, _ = step._draw_steps(choice, 1.0, level, u, Assembly(**SIZE, channels=3))
        assert abs(strength.item() - expected) < 1e-12, level


def test_rand_strings():
    values, steps = drawn(augment.from_timm("rand-m9-mstd0.5-n3-p0.8-inc1"))
    assert steps == 3
    found = shares(values, "op2")
    assert near(found["Identity"], 0.2) and near(found["Equalize"], 0.8 / 15)
    turned = values["strength1"][values["op1"] == NUMBER["Rotate"]] / 3
    level = turned.abs()
    assert level.max() <= 10 and abs(level.mean() - 9) < 0.1 and abs(level.std() - 0.5) < 0.1
    assert near((values["filter1"] == 3).double().mean(), 0.5)
    uniform, _ = drawn(augment.from_timm("rand-m10-mstd101-p1"))
    level = uniform["strength1"][uniform["op1"] == NUMBER["Rotate"]].abs() / 3
    assert level.min() < 0.5 and abs(level.mean() - 5) < 0.5
    weighted, _ = drawn(augment.from_timm("rand-m9-p1-tweights"))
    assert near(shares(weighted, "op1")["Rotate"], 3 / 10.75)
    assert not (weighted["op1"] == weighted["op2"]).any()


def test_other_strings():
    mixed, steps = drawn(augment.from_timm("augmix-m5-w4-d2"), 500)
    assert steps == 8 and {"original", "weight4", "filter8"} <= set(mixed)
    turned = mixed["strength1"][mixed["op1"] == NUMBER["Rotate"]]
    assert turned.abs().max() <= 15
    for name in ("original", "originalr", "v0", "v0r"):
        values, steps = drawn(augment.from_timm(f"{name}-mstd0.5"), 500)
        assert steps == 2
        bits = values["strength1"][values["op1"] == NUMBER["Posterize"]]
        assert len(bits) and bits.min() >= 1
    values, steps = drawn(augment.from_timm("3a"))
    assert steps == 1 and near(shares(values, "op1")["Color"], 1 / 3)
    batch = torch.randint(0, 256, (20, 3, 9, 9), dtype=torch.uint8)
    for config in ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", "rand-m9-t3aw"):
        made = augment.Pipeline(augment.from_timm(config), seed=1, layout="NCHW")
        assert made(batch).float().std() > 20
        assert not torch.equal(made(batch), batch)
