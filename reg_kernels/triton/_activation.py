"""The activations of reg_kernels/_activation.py and their derivatives, on values; torch's formulas.

NaN goes through each. `slope` is leaky_relu's below zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _activation

RELU = tl.constexpr(_activation.RELU)
LEAKY_RELU = tl.constexpr(_activation.LEAKY_RELU)
SILU = tl.constexpr(_activation.SILU)
GELU = tl.constexpr(_activation.GELU)


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.70710678118654752440))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z > 0.0, z, z * slope)
    elif ACTIVATION == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == GELU:
        z = z * normal_cdf(z)
    return z


@triton.jit
def behind_activation(g, z, slope, ACTIVATION: tl.constexpr):
    """The gradient with respect to z, of g with respect to activate(z); at 0 that from below."""
    if ACTIVATION == RELU:
        g = tl.where(z <= 0.0, 0.0, g)  # chosen, not multiplied: a closed position passes no NaN
    elif ACTIVATION == LEAKY_RELU:
        g = tl.where(z > 0.0, g, g * slope)
    elif ACTIVATION == SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        g = g * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    elif ACTIVATION == GELU:
        g = g * (normal_cdf(z) + z * (0.39894228040143267794 * tl.exp(-0.5 * z * z)))
    return g
