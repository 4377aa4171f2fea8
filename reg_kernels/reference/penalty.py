"""L1 and L2 penalties over lists of tensors, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def penalty(tensors: list[Tensor], power: int) -> Tensor:
    """The sum of |x|^power over all elements: float64 if one tensor is, else float32."""
    double = any(x.dtype == torch.float64 for x in tensors)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        wide = x.double()
        total = total + (wide.abs() if power == 1 else wide * wide).sum().to(total.device)
    return total.to(torch.float64 if double else torch.float32)


def penalty_backward(tensors: list[Tensor], grad_output: Tensor, power: int) -> list[Tensor]:
    """grad_output sign(x), or 2 grad_output x, for each tensor."""
    grads = []
    for x in tensors:
        compute = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(compute)
        slope = wide.sgn() if power == 1 else 2 * wide
        grads.append((slope * grad_output.to(x.device, compute)).to(x.dtype))
    return grads
