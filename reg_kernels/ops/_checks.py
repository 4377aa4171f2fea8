"""What arguments have to be: each check, and each message, once.

The first half is for the public functions, which raise what torch raises for the same mistake. The
second half is for an op's entry: an op is also reached by saved programs, by hooks and by compiled
code, so what memory safety rests on is checked again, as RuntimeErrors. It is the twin, for the
implementations in Python, of csrc/torch/checks.h, by which the native ones check:
tests/ops/test_hostile_calls.py holds the two to refuse the same calls.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .._dtypes import DTYPES, SUPPORTED, named
from .._layout import has_samples_outermost, is_channels_last
from .._numbers import check_shares as check_shares
from .._numbers import number as number
from .._numbers import probability as probability
from .._numbers import refuse as refuse

_DTYPES = frozenset(DTYPES)


def hand_over(
    function: Callable[..., Any], arguments: dict[str, Any], *tensors: str, by_place: int = 1
) -> Any:
    """Gives a call to what overrides it: a subclass's __torch_function__, a tracer's proxy.

    `arguments` are the function's own locals() before it has made others. Those that `tensors`
    names may override it. As many arguments as `by_place` says go by their places, the others by
    their names.
    """
    names = list(arguments)
    first = [arguments[name] for name in names[:by_place]]
    others = {name: arguments[name] for name in names[by_place:]}
    relevant = tuple(arguments[name] for name in tensors)
    return handle_torch_function(function, relevant, *first, **others)


def check_tensor(op: str, argument: str, x: Any, expected: str = "a Tensor") -> None:
    if not isinstance(x, Tensor):
        refuse(op, argument, expected, type(x).__name__, TypeError)


def check_dtype(
    op: str,
    argument: str,
    dtype: torch.dtype,
    kind: type[Exception] = RuntimeError,
    and_also: str = "",
    where: str = "",
) -> None:
    """Raises unless it is one of the kernels' types, or the one that `and_also` names."""
    if dtype not in _DTYPES and named(dtype) != and_also:
        also = f" or {and_also}" if and_also else ""
        refuse(op, argument, f"one of {SUPPORTED}{also}", f"{named(dtype)}{where}", kind)


def check_dense(op: str, argument: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        refuse(op, argument, "a dense tensor", named(x.layout))


def check_device(op: str, argument: str, x: Tensor, input: Tensor) -> None:
    """Raises unless x is where the input is."""
    if x.device != input.device:
        refuse(op, argument, f"on the input's device, {input.device}", x.device)


def check_batch(op: str, argument: str, x: Any) -> None:
    check_tensor(op, argument, x)
    check_dense(op, argument, x)
    if x.dim() == 0:
        refuse(op, argument, "a batch (N, ...)", "no dimensions")


def check_like(op: str, argument: str, x: Any, input: Tensor) -> None:
    """Raises unless x is a tensor of the input's shape, dtype and device."""

    def kind(x: Tensor) -> str:
        return f"{named(x.dtype)} of shape {tuple(x.shape)} on {x.device}"

    check_tensor(op, argument, x, "a Tensor or None")
    check_dense(op, argument, x)
    if x.shape != input.shape or x.dtype != input.dtype or x.device != input.device:
        refuse(op, argument, f"like the input, {kind(input)}", kind(x))


def check_has_no_gradient(op: str, argument: str, x: Tensor) -> None:
    if x.requires_grad:
        raise RuntimeError(f"{op}: {argument} must not require grad: detach it")


def check_flag(op: str, argument: str, x: Any) -> None:
    if type(x) is not bool:
        refuse(op, argument, "True or False", type(x).__name__, TypeError)


def check_reduction(op: str, reduction: Any) -> None:
    if reduction not in ("none", "mean", "sum"):
        refuse(op, "reduction", "'none', 'mean' or 'sum'", repr(reduction), ValueError)


def checked_shares(op: str, lam: Tensor, input: Tensor) -> Tensor:
    """`lam`, one share for all samples or one for each, as the ops take it: (1,) or (N,)."""
    if not lam.is_floating_point():
        refuse(op, "lam", "of a floating-point type", named(lam.dtype), TypeError)
    if lam.dim() > 1 or lam.numel() not in (1, input.shape[0]):
        must = f"one number, or one for each of the {len(input)} samples"
        refuse(op, "lam", must, f"shape {tuple(lam.shape)}", ValueError)
    check_has_no_gradient(op, "lam", lam)
    check_device(op, "lam", lam, input)
    lam = lam if lam.dtype in _DTYPES else lam.double()
    return lam.detach().reshape(-1).contiguous()


def checked_channels(name: str, argument: str, values: Any, input: Tensor) -> Any:
    """`values` as a Tensor (C,) or a tuple of C floats; None as it is."""
    if values is None:
        return None
    channels = input.shape[1] if input.dim() > 1 else 0
    as_it_is = type(values) is tuple and all([type(value) is float for value in values])
    if as_it_is and len(values) == channels > 0:  # nearly always
        return values
    if not isinstance(values, (Tensor, numbers.Real)) and hasattr(values, "tolist"):  # numpy's
        values = values.tolist()
    if isinstance(values, Tensor):
        shape = tuple(values.shape)
        check_has_no_gradient(name, argument, values)
    elif isinstance(values, numbers.Real):
        values, shape = (number(name, argument, values),) * max(channels, 1), ()
    elif isinstance(values, Sequence) and not isinstance(values, str):
        values = tuple(number(name, argument, value) for value in values)
        shape = (len(values),)
    else:
        check_tensor(name, argument, values, "a number, a sequence or a Tensor")
    if channels == 0 or shape not in ((), (1,), (channels,)):
        raise ValueError(
            f"{name}: {argument} must be one number for each of the {channels} channels, "
            f"got shape {shape}"
        )
    if isinstance(values, Tensor):
        return values.to(input.device).expand(channels).contiguous()
    return values if len(values) == channels else values * channels


def check_in_place(op: str, input: Tensor) -> None:
    """What autograd would raise as well, but only after the input had been overwritten."""
    if torch.compiler.is_compiling():  # its tracing checks before anything runs
        return
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: an inference tensor cannot be changed in place outside of inference mode: "
            "use inplace=False, or clone it"
        )
    if not torch.is_grad_enabled() or not input.requires_grad:
        return
    base = input._base if input._is_view() else None
    if input.is_leaf or (base is not None and base.is_leaf):
        raise RuntimeError(
            f"{op}: a leaf tensor that requires grad, or a view of one, cannot be changed in "
            "place: use inplace=False, or torch.no_grad()"
        )
    metadata = torch._C._autograd
    if base is not None and (metadata._get_creation_meta(input) != metadata.CreationMeta.DEFAULT):
        raise RuntimeError(
            f"{op}: a view made by a function of several outputs, or without grad, cannot be "
            "changed in place: use inplace=False"
        )


# An op's entry


def described(x: Any) -> Any:
    """A tensor as messages name it; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    return f"{named(x.dtype)} of shape {tuple(x.shape)} and strides {x.stride()}"


class Entry:
    """What an op was handed: its name, and the device that its tensors have to be on."""

    __slots__ = ("device", "op")

    def __init__(self, op: str, x: Tensor) -> None:
        self.op = op
        self.device = x.device

    def refuse(self, name: str, must: str, got: Any) -> NoReturn:
        refuse(self.op, name, must, described(got))

    def check_memory(self, x: Tensor, name: str, on_host: bool = False) -> None:
        """Raises unless a kernel may read or write x: on this device, or with `on_host` on the CPU,
        in memory that was not freed."""
        if x.device != self.device and not (on_host and x.device.type == "cpu"):
            where = "on the CPU or on" if on_host else "on"
            self.refuse(name, f"{where} the tensors' device", "one on another device")
        if x.numel() == 0:
            return
        last = x.storage_offset()
        if x.is_contiguous():
            last += x.numel() - 1
        else:
            last += sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        if last >= x.untyped_storage().nbytes() // x.itemsize:
            self.refuse(name, "a tensor whose memory was not freed", x)
        if (address := x.data_ptr()) % x.itemsize:
            must = "at a multiple of its elements' size (a clone is)"
            self.refuse(name, must, f"address {address}")

    def check_floats(self, x: Tensor, name: str) -> None:
        if x.dtype not in _DTYPES:
            self.refuse(name, f"one of {SUPPORTED}", x)

    def check_vector(
        self, x: Tensor, dtype: torch.dtype, count: int, name: str, on_host: bool = False
    ) -> None:
        """Raises unless x is `count` numbers of a type that lie side by side."""
        if x.dtype != dtype or x.numel() != count or not x.is_contiguous():
            self.refuse(name, f"contiguous {named(dtype)} of {count} elements", x)
        self.check_memory(x, name, on_host)

    def check_number(
        self, x: Tensor | None, dtype: torch.dtype, name: str, on_host: bool = False
    ) -> None:
        if x is None:
            return
        if x.dtype != dtype or x.numel() != 1:
            self.refuse(name, f"a tensor of one element, of {named(dtype)}", x)
        self.check_memory(x, name, on_host)

    def check_channels(self, x: Tensor, name: str = "input") -> None:
        """Raises unless x is (N, C, ...), contiguous or dense with the channels last."""
        if x.dim() < 2:
            self.refuse(name, "of at least 2 dimensions", x)
        if not x.is_contiguous() and not is_channels_last(x):
            self.refuse(name, "contiguous, or dense with the channels last", x)

    def check_batch(self, x: Tensor, name: str) -> None:
        """Raises unless x is (N,), or (N, C, ...) as check_channels has it."""
        if x.dim() >= 2:
            self.check_channels(x, name)
        elif x.dim() != 1 or not x.is_contiguous():
            self.refuse(name, "a contiguous batch", x)
        self.check_memory(x, name)

    def check_probability(self, p: float) -> None:
        if not 0.0 <= p <= 1.0:
            self.refuse("p", "in [0, 1]", p)

    def check_rng_state(self, rng_state: Tensor) -> None:
        self.check_vector(rng_state, torch.int64, 2, "rng_state", on_host=True)

    def check_samples(self, x: Tensor, name: str = "input") -> None:
        """Raises unless x is (N, ...) of floats, dense with its samples outermost."""
        if x.dim() == 0 or not has_samples_outermost(x):
            self.refuse(name, "a batch, dense with its samples outermost", x)
        self.check_floats(x, name)
        self.check_memory(x, name)

    def check_like(self, x: Tensor, other: Tensor | None, name: str) -> None:
        """Raises unless another tensor has x's dtype, shape and strides."""
        if other is None:
            return
        if other.dtype != x.dtype or not has_layout_of(x, other):
            self.refuse(name, f"like the input, {described(x)}", other)
        self.check_memory(other, name)

    def check_element_offset(self, element_offset: int) -> None:
        if not 0 <= element_offset < 2**62:
            self.refuse("element_offset", "in [0, 2^62)", element_offset)

    def check_drawn(self, a: Any) -> None:
        """Raises unless rng_state and element_offset can be drawn by, and traced_p is a number."""
        self.check_element_offset(a.element_offset)
        self.check_rng_state(a.rng_state)
        self.check_number(a.traced_p, torch.float64, "traced_p", on_host=True)

    def check_shares(self, lam: Tensor, samples: int) -> None:
        """Raises unless lam is one number, or one for each sample."""
        if lam.numel() not in (1, samples) or not lam.is_contiguous():
            self.refuse("lam", f"contiguous, of 1 element or of {samples}", lam)
        self.check_floats(lam, "lam")
        self.check_memory(lam, "lam")

    def check_apart(self, written: Tensor, other: Tensor | None, name: str) -> None:
        """Raises where what an op writes overlaps a tensor that it reads; both are dense."""
        if other is None or written.device != other.device:
            return
        begin, own = other.data_ptr(), written.data_ptr()
        if own < begin + other.nbytes and begin < own + written.nbytes:
            self.refuse(name, "apart in memory from what is written", "a part of it")


def has_layout_of(x: Tensor, other: Tensor) -> bool:
    """Whether `other` has x's shape and strides; of one element a dimension's say nothing."""
    if x.shape != other.shape:
        return False
    if x.numel() == 0 or x.stride() == other.stride():
        return True
    strides = zip(x.shape, x.stride(), other.stride(), strict=True)
    return all(n <= 1 or a == b for n, a, b in strides)
