"""What adversarial attacks alone have on a GPU: a whole attack in a CUDA graph."""

import pytest
import torch

from reg_kernels import nn as fused
from reg_kernels.adversarial import PGD

from support import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_attack_is_captured(norm):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        fused.BatchNormAct2d(8),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(5),
    ).cuda()
    x, y = torch.rand(8, 3, 8, 8, device="cuda"), torch.randint(5, (8,), device="cuda")
    model(x)
    eps = {"linf": 0.1, "l2": 0.7, "l1": 4.0}[norm]
    attack = PGD(model, eps, eps / 4, 3, norm, random_start=False, mean=0.4, std=0.5)
    replay, found = captured(lambda: attack(x, y))
    statistics = model[1].running_mean.clone()
    for _ in range(2):
        x.copy_(x.roll(1, 0))
        replay()
        torch.testing.assert_close(found, attack(x, y))
    assert torch.equal(model[1].running_mean, statistics)
