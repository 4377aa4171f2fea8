"""Uniform noise: the public function. _noise.py registers the op."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import has_torch_function_unary

from ._checks import hand_over
from ._draw import Draw
from ._noise import UNIFORM


def uniform_noise(
    input: Tensor,
    amplitude: float,
    training: bool = True,
    inplace: bool = False,
    *,
    multiplicative: bool = False,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Adds uniform noise to each element, or multiplies each by 1 plus such noise.

    The result is :math:`x + a u`, or :math:`x + a u x` with `multiplicative`, where :math:`u` is
    uniform from -1 to 1, of 32 bits. Arguments, shapes, result, gradient and errors are those of
    `gaussian_noise`, with the amplitude :math:`a`, half of the distribution's width, for its `std`.

    Source: as regularisation C. Bishop, "Training with noise is equivalent to Tikhonov
    regularization", Neural Computation 7 (1995).
    """
    if has_torch_function_unary(input):
        return hand_over(uniform_noise, locals(), "input")
    how = Draw(amplitude, rng_state, element_offset, backend)
    return UNIFORM.apply(input, how, training, inplace, multiplicative)
