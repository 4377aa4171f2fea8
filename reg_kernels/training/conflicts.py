"""Methods that work against each other, found before a training begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..optim._param_groups import why_not
from .recipe import Recipe


class Conflict(NamedTuple):
    """Two methods in each other's way.

    Args:
        text: which they are, and what to do.
        page: the page of the documentation that speaks of it.
    """

    text: str
    page: str

    def __str__(self) -> str:
        return f"{self.text} (docs/{self.page})"


def conflicts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    recipe: Recipe | None = None,
) -> list[Conflict]:
    """Looks for methods of regularisation that work against each other.

    Args:
        model: the net; the order in which its layers were registered is taken for that in which
            they run.
        optimizer: what trains it, where there is one already.
        recipe: what it is trained with, where that is known.

    Returns:
        A list, empty where nothing was found, of `Conflict`:

        - dropout before BatchNorm: in training the dropped values have more variance than in
          evaluation, and BatchNorm's running statistics are those of training;
        - weight decay or L1 on norms and biases, which pulls scales to 0 that normalisation keeps
          from mattering;
        - mixed images with accuracies of hard labels on the training set: they are not of what the
          net is trained on, and the gap to the test set is not either.

    Raises:
        TypeError: `model` is no module.

    Source: X. Li et al., "Understanding the disharmony between dropout and batch normalization by
    variance shift", CVPR 2019; T. He et al., "Bag of tricks for image classification with
    convolutional neural networks", CVPR 2019, section 3.1; H. Zhang et al., "mixup: beyond
    empirical risk minimization", ICLR 2018.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"conflicts: model must be a Module, got {type(model).__name__}")
    found = [_dropout_before_norm(model)]
    if optimizer is not None:
        found.append(_decay_of_norms(model, optimizer))
    if recipe is not None and (recipe.mixup > 0 or recipe.cutmix > 0):
        found.append(
            Conflict(
                "images are mixed in training: losses and accuracies of clean training images by "
                "hard labels are not of what the net is trained on, nor is the gap to the test "
                "set; compare nets by the test set",
                "mixing_and_losses.md",
            )
        )
    return [conflict for conflict in found if conflict is not None]


def _dropout_before_norm(model: nn.Module) -> Conflict | None:
    dropped = None
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            dropped = dropped or name
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and dropped is not None:
            return Conflict(
                f"dropout ({dropped!r}) comes before BatchNorm ({name!r}), whose running "
                "statistics have dropout's variance in evaluation, too; drop after the last "
                "BatchNorm",
                "layers.md",
            )
    return None


def _decay_of_norms(model: nn.Module, optimizer: torch.optim.Optimizer) -> Conflict | None:
    names = {
        parameter: f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if why_not(module, name, parameter) is not None
    }
    decaying = [
        names[parameter]
        for group in optimizer.param_groups
        if group.get("weight_decay", 0) > 0 or group.get("l1", 0) > 0
        for parameter in group["params"]
        if parameter in names
    ]
    if not decaying:
        return None
    more = f" and {len(decaying) - 1} more" if len(decaying) > 1 else ""
    return Conflict(
        f"weights decay that are of norms or biases ({decaying[0]!r}{more}); "
        "reg_kernels.optim.param_groups leaves them out",
        "optimizers.md",
    )
