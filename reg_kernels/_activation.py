"""The activations that fused ops apply, by name and by the number that the ops' schemas pass."""

from __future__ import annotations

# As in csrc/include/reg_kernels/activation.h.
NONE, RELU, LEAKY_RELU, SILU, GELU = range(5)

NUMBERS: dict[str | None, int] = {
    None: NONE,
    "relu": RELU,
    "leaky_relu": LEAKY_RELU,
    "silu": SILU,
    "gelu": GELU,
}
PIECEWISE_LINEAR = (NONE, RELU, LEAKY_RELU)


def has_gate(activation: int, has_residual: bool, p: float) -> bool:
    """Whether a forward keeps one bit an element for its backward.

    It does where something is dropped, and where the sign of a piecewise linear activation depends
    on a residual as well, which the backward then need not read again.
    """
    return p > 0.0 or (has_residual and activation in (RELU, LEAKY_RELU))


def needs_preactivation(activation: int, gated: bool, p: float) -> bool:
    """Whether a backward has to know what the activation was applied to."""
    if activation == NONE or (gated and activation == RELU):
        return False
    return not (gated and activation == LEAKY_RELU and p == 0.0)
