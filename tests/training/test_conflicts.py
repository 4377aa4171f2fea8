"""Methods in each other's way, in nets of torch's layers and of ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reg_kernels
from reg_kernels.training import Recipe, conflicts


def net(*front: nn.Module) -> nn.Sequential:
    return nn.Sequential(*front, nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))


@pytest.mark.parametrize("convert", [lambda model: model, reg_kernels.convert])
def test_dropout_before_batch_norm(convert) -> None:
    assert conflicts(convert(net())) == []
    assert conflicts(convert(net(nn.Dropout(0.0)))) == []
    (found,) = conflicts(convert(net(nn.Dropout(0.1))))
    assert "('0') comes before BatchNorm ('2')" in found.text
    assert str(found).endswith("(docs/layers.md)")


def test_decay_of_norms_and_biases() -> None:
    model = net()
    groups = reg_kernels.optim.param_groups(model, 0.1)
    assert conflicts(model, torch.optim.AdamW(groups)) == []
    assert conflicts(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0)) == []
    for optimizer in (
        torch.optim.SGD(model.parameters(), weight_decay=0.1),
        reg_kernels.optim.AdamW(model.parameters(), weight_decay=0.0, l1=0.1),
    ):
        (found,) = conflicts(model, optimizer)
        assert "('0.bias' and 2 more)" in found.text
        assert found.page == "optimizers.md"


def test_mixed_images_and_hard_labels() -> None:
    assert conflicts(net(), recipe=Recipe(dropout=0.5)) == []
    for recipe in (Recipe(mixup=0.2), Recipe(cutmix=1.0)):
        (found,) = conflicts(net(), recipe=recipe)
        assert found.page == "mixing_and_losses.md"


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"^conflicts: model must be a Module, got dict$"):
        conflicts({})
