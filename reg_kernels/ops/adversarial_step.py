"""One step of an adversarial attack: schema, validation, and the public function.

The op works in place and records no gradient: a batch under attack is stepped as an optimizer steps
parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._dtypes import named
from .._numbers import number, traced_numbers, varies
from ..reference import adversarial_step as reference
from ._checks import (
    Entry,
    check_batch,
    check_device,
    check_dtype,
    check_in_place,
    check_like,
    check_tensor,
    checked_channels,
    hand_over,
    refuse,
)
from ._modes import COMPILE, is_fake, shows_values, watcher
from ._registry import register
from ._route import Route, formula, in_order

# By their number in the op. Users of other libraries have the order of the norm instead.
NORMS = {"linf": reference.LINF, "l1": reference.L1, "l2": reference.L2}
_ORDERS: dict[Any, str] = {math.inf: "linf", 1: "l1", 2: "l2"}

# Registration


def _check(op: str, a: Any) -> None:
    entry, x = Entry(op, a.adv), a.adv
    entry.check_batch(x, "adv")
    entry.check_floats(x, "adv")
    for name in ("grad", "clean"):
        entry.check_like(x, getattr(a, name), name)
    if a.norm not in NORMS.values():
        entry.refuse("norm", "0, 1 or 2", a.norm)
    for name in ("step_sizes", "radii"):
        if (values := getattr(a, name)) is not None:
            count = 1 if values.numel() == 1 else len(x)
            entry.check_vector(values, torch.float64, count, name)
    if a.channels is not None:
        compute = torch.promote_types(x.dtype, torch.float32)
        count = 4 * (x.shape[1] if x.dim() >= 2 else 1)
        entry.check_vector(a.channels, compute, count, "channels")
    for name in ("grad", "clean", "step_sizes", "radii", "channels"):
        entry.check_apart(x, getattr(a, name), name)


_STEP = register(
    "adversarial_step_",
    # step_sizes and radii are (1,) or (N,), or None: then the floats beside them count. channels
    # are (4, C): what turns a difference into pixels, its inverse, and the bounds, which are the
    # floats where there are none.
    "(Tensor(a!) adv, Tensor grad, Tensor clean, Tensor? step_sizes, float step_size, "
    "Tensor? radii, float eps, int norm, float lower, float upper, Tensor? channels) -> ()",
    fake=lambda adv, *rest: None,
    reference=reference.adversarial_step_,
    triton="adversarial_step:adversarial_step_",
    route=Route(
        by_torch=formula(reference.adversarial_step_),
        moves=lambda inputs, rest: rest[:1],
    ),
    check=_check,
)

# Validation


def checked_norm(name: str, norm: Any, argument: str = "norm") -> str:
    """ "linf", "l1" or "l2" of what names it."""
    word = norm.lower().replace("_", "") if isinstance(norm, str) else ""
    if isinstance(norm, int | float):
        word = _ORDERS.get(norm, "")
    if word not in NORMS:
        refuse(name, argument, "'linf', 'l1' or 'l2'", repr(norm), ValueError)
    return word


def checked_bounds(name: str, lower: Any, upper: Any) -> tuple[float, float]:
    """Both as floats, infinite where there is none."""
    lower = -math.inf if lower is None else number(name, "lower", lower)
    upper = math.inf if upper is None else number(name, "upper", upper)
    if lower == math.inf:
        refuse(name, "lower", "below inf", lower, ValueError)
    if upper == -math.inf:
        refuse(name, "upper", "above -inf", upper, ValueError)
    if not lower <= upper:
        refuse(name, "lower", "at most upper", f"{lower} and {upper}", ValueError)
    return lower, upper


def checked_size(name: str, argument: str, value: Any, signed: bool = False) -> float:
    """A step size, which is finite and may be negative, or a radius, which may not be NaN."""
    value = number(name, argument, value, "a number or a Tensor")
    if torch.compiler.is_compiling() and varies(value):
        return value
    if signed and not math.isfinite(value):
        refuse(name, argument, "finite", value, ValueError)
    if not signed and not value >= 0:
        refuse(name, argument, "at least 0", value, ValueError)
    return value


def of_samples(
    name: str, argument: str, value: Any, adv: Tensor, looks: str | None
) -> tuple[Tensor | None, float]:
    """`value` as the op takes it: float64 (N,) or (1,), or a float."""
    signed = argument == "step_size"
    if not isinstance(value, Tensor) or (value.dim() == 0 and value.device.type == "cpu"):
        value = checked_size(name, argument, value, signed)
        if looks is not COMPILE:
            return None, value
        return traced_numbers(adv.device, value), 0.0
    if not value.is_floating_point():
        refuse(name, argument, "of a floating-point type", named(value.dtype), TypeError)
    if value.dim() > 1 or value.numel() not in (1, len(adv)):
        must = f"one number, or one for each of the {len(adv)} samples"
        refuse(name, argument, must, f"shape {tuple(value.shape)}", ValueError)
    check_device(name, argument, value, adv)
    value = value.detach().reshape(-1).double().contiguous()
    if shows_values(value, looks) and looks is None:
        wrong = ~value.isfinite() if signed else ~(value >= 0)
        if bool(wrong.any()):
            must = "finite" if signed else "at least 0"
            refuse(name, argument, must, value[wrong][0].item(), ValueError)
    return value, 0.0


def channel_rows(
    name: str, adv: Tensor, mean: Any, std: Any, lower: float, upper: float
) -> Tensor | None:
    """What the op needs to count in pixels v where its input is (v - mean) / std."""
    mean = checked_channels(name, "mean", mean, adv)
    std = checked_channels(name, "std", std, adv)
    if mean is None and std is None:
        return None
    if isinstance(std, tuple) and not all(value > 0 for value in std):
        refuse(name, "std", "above 0", std, ValueError)
    if isinstance(std, Tensor) and shows_values(std, watcher()) and not bool((std > 0).all()):
        refuse(name, "std", "above 0", std.tolist(), ValueError)
    count = adv.shape[1]
    mean = (0.0,) * count if mean is None else mean
    std = (1.0,) * count if std is None else std
    given = isinstance(mean, Tensor) or isinstance(std, Tensor)
    make = _rows if given or torch.compiler.is_compiling() or is_fake() else _kept_rows
    dtype = torch.promote_types(adv.dtype, torch.float32)
    return make(mean, std, lower, upper, dtype, adv.device)


def _rows(
    mean: Any, std: Any, lower: float, upper: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    mean, std = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (mean, std))
    return torch.stack([std, 1 / std, (lower - mean) / std, (upper - mean) / std]).to(dtype)


@functools.lru_cache(maxsize=64)
def _kept_rows(*arguments: Any) -> Tensor:
    """The same, made once for numbers: on a GPU it would be copied there each time."""
    with torch.inference_mode(False):
        return _rows(*arguments)


def _check_written(name: str, adv: Tensor) -> None:
    """That nobody looks for adv's old gradient in vain: a leaf has none."""
    with torch.no_grad():
        check_in_place(name, adv)
    if torch.is_grad_enabled() and adv.requires_grad and not adv.is_leaf:
        refuse(name, "adv", "a leaf, or without a gradient: detach it", "one of a graph")


def adversarial_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor | float,
    eps: Tensor | float,
    norm: str | float = "linf",
    lower: float | None = None,
    upper: float | None = None,
    *,
    mean: Tensor | Sequence[float] | float | None = None,
    std: Tensor | Sequence[float] | float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Steps a batch along its gradient and projects it back into a ball, in place, in one pass.

    For "linf" the result is :math:`\min(\max(x + a\,\mathrm{sign}(g), x_0 - \epsilon), x_0 +
    \epsilon)`. For "l2" and "l1" the step is :math:`a\,g / \|g\|` in that norm of each sample, and
    :math:`x - x_0` is then replaced by the nearest point whose norm is at most :math:`\epsilon`.
    Last, values are brought into [lower, upper].

    Args:
        adv: the batch under attack (N, ...), written over; float64, float32, float16 or bfloat16.
            It may be a leaf that requires grad: it is stepped as a parameter is, and nothing is
            recorded.
        grad: the gradient of the loss by adv, of its shape and dtype. The step is uphill.
        clean: the batch without an attack, likewise.
        step_size: a number or, for each sample, a tensor (N,) of floats on adv's device. A negative
            one steps downhill: towards the class of a targeted attack.
        eps: the ball's radius, likewise, at least 0.
        norm: "linf", "l2" or "l1"; or its order, math.inf, 2 or 1.
        lower, upper: what values are brought into; None for no bound.
        mean, std: of each channel (C,), where adv is (v - mean) / std of pixels v, as a tensor, a
            sequence or one number. step_size, eps, lower and upper are then in terms of the pixels.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        adv.

    Raises:
        ValueError: a number is out of range, lower is above upper, a shape does not fit, or `norm`
            or `backend` is unknown.
        TypeError: an argument is of the wrong type.
        RuntimeError: dtypes or devices differ, adv shares memory with grad or clean or is part of
            a graph, or `backend` cannot run here. Nothing has been changed then.

    A gradient of 0 or NaN moves nothing. An infinite one has a sign for "linf", and counts as 0 in
    the norms of the others. A NaN in adv or clean stays, and touches no other value. On a GPU the
    values of tensors are not looked at: a radius there that is negative or NaN counts as 0.

    16-bit floats are computed in float32 and rounded such that they do not leave the ball: to
    nearest, or to the next number towards `clean` where the nearest is further than eps ("linf") or
    than the unrounded value ("l2", "l1") from it. A step below half a unit in the last place is
    then lost; keep adv in float32 for "l2" and "l1". A bound that the dtype does not have is
    rounded to nearest.

    Norms are summed in float64, in an order that depends on sizes alone: two runs give the same
    bits.

    Source: A. Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.
    The L1 ball: J. Duchi et al., "Efficient projections onto the l1-ball", 2008.
    """
    if has_torch_function_variadic(adv, grad, clean):
        return hand_over(adversarial_step_, locals(), "adv", "grad", "clean", by_place=5)
    name = "adversarial_step_"
    check_batch(name, "adv", adv)
    check_dtype(name, "adv", adv.dtype)
    for argument, x in (("grad", grad), ("clean", clean)):
        check_tensor(name, argument, x)
        check_like(name, argument, x, adv)
    number_of_norm = NORMS[checked_norm(name, norm)]
    lower, upper = checked_bounds(name, lower, upper)
    looks = watcher()
    steps = of_samples(name, "step_size", step_size, adv, looks)
    radii = of_samples(name, "eps", eps, adv, looks)
    channels = channel_rows(name, adv, mean, std, lower, upper)
    if looks is None:
        _check_written(name, adv)
    overload = _STEP.overload(adv.device, adv.dtype, backend, looks)
    target, grad, clean = (x.detach() if x.requires_grad else x for x in (adv, grad, clean))
    x = in_order(target, looks)
    grad, clean = (in_order(y, looks, like=x) for y in (grad, clean))
    arguments = (x, grad, clean, *steps, *radii, number_of_norm, lower, upper, channels)
    _STEP.route.call(looks, overload, (), arguments)
    if x is not target:
        target.copy_(x)
    return adv
