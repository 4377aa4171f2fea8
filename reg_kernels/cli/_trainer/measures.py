"""How good a net is on a set of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parallel import ALONE, Ranks

EVALUATION_BATCH = 512
BINS = 15


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Mean cross-entropy, accuracy and calibration error of a net in evaluation mode.

    Args:
        model: gives scores (N, K) of images; put into evaluation mode.
        images: (N, C, H, W), N at least 1.
        labels: (N,), int64, on the images' device.
        ranks: who share the work; each of them calls this, and all get the same.

    Returns:
        "loss", "accuracy", and "ece" as `expected_calibration_error` has it.
    """
    model.eval()
    batches = images.split(EVALUATION_BATCH * ranks.size)
    scores = torch.cat([ranks.together(model, batch) for batch in batches])
    return {
        "loss": F.cross_entropy(scores.double(), labels).item(),
        "accuracy": (scores.argmax(1) == labels).sum().item() / len(labels),
        "ece": expected_calibration_error(scores, labels),
    }


def expected_calibration_error(scores: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """How far confidence and accuracy are apart: the mean over bins of equal width of confidence,
    weighted by the images in each, of the difference of the two means.

    Source: C. Guo et al., "On calibration of modern neural networks", ICML 2017, section 2.
    """
    confidence, found = F.softmax(scores.double(), 1).max(1)
    # As there, a bin is open at its lower end.
    of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    zeros = torch.zeros(bins, dtype=torch.float64, device=scores.device)
    apart = zeros.index_add(0, of, (found == labels).double() - confidence)
    return float(apart.abs().sum() / len(labels))
