"""Knowledge distillation and its gradient in Triton, by the losses' kernels (_loss_kernels.py).

Bytes an element, s and t = sizeof of the student's and of the teacher's dtype:
    loss_kernel                    x, teacher                   s + t
      and keeps the gradient       x, teacher, gradient         2 s + t; 3 s + 2 t past a tile
    loss_backward_kernel           x, teacher, gradient         2 s + t
Three exponentials an element. As in cross_entropy.py otherwise; a tile holds up to 8192 classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._loss import TargetCall, Teacher, launch_backward, launch_forward


def distillation(input: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, of its schema's arguments: (loss, stats, gradient)."""
    *target, temperature, alpha, traced_softness, keep_gradient = arguments
    of_teacher = Teacher(teacher, temperature, alpha, traced_softness)
    return launch_forward(input, TargetCall(*target), keep_gradient, of_teacher)


def distillation_backward(
    grad_output: Tensor, input: Tensor, stats: Tensor, teacher: Tensor, *arguments: Any
) -> Tensor:
    """The op's gradient by the input."""
    *target, temperature, alpha, traced_softness = arguments
    of_teacher = Teacher(teacher, temperature, alpha, traced_softness)
    return launch_backward(grad_output, input, stats, TargetCall(*target), of_teacher)
