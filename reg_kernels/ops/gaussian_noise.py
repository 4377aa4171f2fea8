"""Gaussian noise: the public function. _noise.py registers the op."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import has_torch_function_unary

from ._checks import hand_over
from ._draw import Draw
from ._noise import GAUSSIAN


def gaussian_noise(
    input: Tensor,
    std: float,
    training: bool = True,
    inplace: bool = False,
    *,
    multiplicative: bool = False,
    rng_state: Tensor | None = None,
    element_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Adds normal noise to each element, or multiplies each by 1 plus such noise.

    The result is :math:`x + \sigma z`, or :math:`x + \sigma z x` with `multiplicative`, where
    :math:`z` is standard normal. The gradient is that of the output, times :math:`1 + \sigma z`
    with `multiplicative`; the noise is drawn again for it and nothing of it is kept.

    Two words of 32 bits make two normal numbers, the same bits in every implementation. They reach
    6.86; of a normal distribution 6e-11 lie further out than 6.55.

    Args:
        input: a tensor of any shape; float64, float32, float16, bfloat16 or uint8. 16-bit floats
            are computed in float32 and rounded once; bytes as well, and the result is rounded and
            held to [0, 255].
        std: the standard deviation of the noise, finite and at least 0, in the input's units, of
            which an image of bytes has 255.
        training: False returns `input` itself.
        inplace: True writes over `input` and returns it.
        multiplicative: True multiplies the noise by the input.
        rng_state, element_offset, backend: as in `dropout`.

    Returns:
        A tensor of the input's shape and dtype, with its memory layout where that is dense. `input`
        itself where there is no noise.

    Raises:
        ValueError: `std` is negative, infinite or NaN, or `backend` is unknown.
        TypeError: `input` is no tensor, `std` no number, or `multiplicative` no bool.
        RuntimeError: as `dropout` raises it.

    Source: G. Box, M. Muller, "A note on the generation of random normal deviates", Ann. Math.
    Stat. 29 (1958); as regularisation C. Bishop, "Training with noise is equivalent to Tikhonov
    regularization", Neural Computation 7 (1995).
    """
    if has_torch_function_unary(input):
        return hand_over(gaussian_noise, locals(), "input")
    how = Draw(std, rng_state, element_offset, backend)
    return GAUSSIAN.apply(input, how, training, inplace, multiplicative)
