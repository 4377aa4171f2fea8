"""Uniform noise: the public function. _noise.py registers the op."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import has_torch_function_unary

from ._checks import hand_over
from ._noise import UNIFORM
from ._route import Draw


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
    uniform from -1 to 1, of 32 bits. The gradient is as in `gaussian_noise`.


    Args:
        input: a tensor of any shape; float64, float32, float16, bfloat16 or uint8. 16-bit floats
            are computed in float32 and rounded once; bytes as well, and the result is rounded and
            held to [0, 255].
        amplitude: half of the width of the distribution,
            finite and at least 0, in the input's units, of which an image of bytes has 255.
        training: False returns `input` itself.
        inplace: True writes over `input` and returns it.
        multiplicative: True multiplies the noise by the input.
        rng_state, element_offset, backend: as in `dropout`.

    Returns:
        A tensor of the input's shape and dtype, with its memory layout where that is dense. `input`
        itself where there is no noise.

    Raises:
        ValueError: `amplitude` is negative, infinite or NaN, or `backend` is unknown.
        TypeError: `input` is no tensor, `amplitude` no number, or `multiplicative` no bool.
        RuntimeError: as `dropout` raises it.

    Source: the same contract as `dropout`'s for the draws, a whole word for each element.
    """
    if has_torch_function_unary(input):
        return hand_over(uniform_noise, locals(), "input")
    how = Draw(amplitude, rng_state, element_offset, backend)
    return UNIFORM.apply(input, how, training, inplace, multiplicative)
