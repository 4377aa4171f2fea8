"""How a pipeline's batch was mixed, as columns of its parameters; and what lies on the images."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import named
from ..ops._modes import unseen
from ._draws import sent
from ._images import _refuse
from .mixup import Mixing
from .params import Params

# The row of the partner; the share of a sample's own pixels outside of the box (1 where nothing is
# blended); the box that is the partner's, empty for none; and the share of its own label.
_BOX = tuple(f"Mixup.{side}" for side in ("x1", "y1", "x2", "y2"))
MIX_COLUMNS = ("Mixup.partner", "Mixup.lam", *_BOX, "Mixup.label_lam")


@unseen
def columns_of(mixing: Mixing, samples: int) -> list[Tensor]:
    partner = torch.arange(samples - 1, -1, -1, dtype=torch.float64)
    boxes = torch.zeros(4) if mixing.boxes is None else mixing.boxes
    lam, label_lam = (x.double().expand(samples) for x in (mixing.lam, mixing.label_lam))
    return [partner, lam, *boxes.double().expand(samples, 4).unbind(1), label_lam]


def on_device(mixing: Mixing, images: Tensor) -> Mixing:
    lam, boxes, label_lam = mixing
    if boxes is not None:
        boxes = sent(boxes, images.device)
    return Mixing(sent(lam, images.device), boxes, sent(label_lam, images.device))


def check_unmixed(argument: str, params: Params) -> None:
    """Refuses what has no place in a mixture of two images."""
    if _blends(params) or _pastes(params):
        must = f"of images that were not mixed, since {argument} do not follow Mixup"
        _refuse("params", must, "those of a mixed batch; call the Mixup by itself afterwards")


def mixed_masks(masks: Tensor, params: Params) -> Tensor:
    """(N, H, W) or (N, C, H, W), as the images were mixed."""
    if not (_blends(params) or _pastes(params)):
        return masks
    each = (-1, *(1,) * (masks.dim() - 1))
    columns = torch.stack([params[name] for name in MIX_COLUMNS])
    partner, lam, *box = (x.view(each) for x in sent(columns, masks.device)[:6])
    x1, y1, x2, y2 = box
    others = masks[partner.flatten().long()]
    if _blends(params):
        if not masks.is_floating_point():
            must = "of floats where Mixup blended the images, since labels have no mean"
            _refuse("masks", must, named(masks.dtype))
        lam = lam.to(torch.promote_types(masks.dtype, torch.float32))
        blended = (lam * masks + (1 - lam) * others).to(masks.dtype)
        masks = torch.where(lam == 1, masks, blended)
    y = torch.arange(masks.shape[-2], device=masks.device).unsqueeze(1)
    x = torch.arange(masks.shape[-1], device=masks.device)
    return torch.where((y >= y1) & (y < y2) & (x >= x1) & (x < x2), others, masks)


def _blends(params: Params) -> bool:
    return "Mixup.lam" in params.columns and bool((params["Mixup.lam"] != 1).any())


def _pastes(params: Params) -> bool:
    """Whether any box is not empty."""
    if "Mixup.x1" not in params.columns:
        return False
    return bool((params["Mixup.x2"] > params["Mixup.x1"]).any())
