"""Mixup and CutMix: schema, fake, gradient, validation, and the public functions.

One op for both, and for batches that mix them: w x + (1 - w) partner, w being 0 inside of a
sample's box and its lambda elsewhere, then a scale and a shift for each channel. It is linear in
its input: the gradient goes to each sample by its own weight, and to the partner by the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from .._dtypes import DTYPES, SUPPORTED, named
from .._layout import is_channels_last, keeps_channels_last
from .._numbers import traced_numbers, varies
from ..reference import mixup as reference
from ._checks import (
    Entry,
    check_device,
    check_dtype,
    check_in_place,
    check_shares,
    check_tensor,
    checked_channels,
    checked_shares,
    hand_over,
    probability,
    refuse,
)
from ._modes import COMPILE, FUNC, is_fake, shows_values, watcher
from ._registry import implementation_of, register
from ._route import Linear, Route, formula, in_order

# Entries


def _check_blend(entry: Entry, x: Tensor, a: Any, dtype: torch.dtype, *constants: str) -> None:
    """The weights of a blend, and of a result of `dtype` the constants that are named."""
    samples = x.shape[0]
    if a.lam is not None:
        entry.check_shares(a.lam, samples)
    if a.boxes is not None:
        if x.dim() < 4:
            entry.refuse("boxes", "None but for images (N, C, ..., H, W)", x)
        count = 4 if a.boxes.numel() == 4 else 4 * samples
        entry.check_vector(a.boxes, torch.int64, count, "boxes")
    compute = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    for name in constants:
        if (values := getattr(a, name)) is not None:
            entry.check_vector(values, compute, x.shape[1] if x.dim() >= 2 else 1, name)


def _check_result(entry: Entry, x: Tensor, a: Any) -> None:
    if a.dtype not in DTYPES:
        entry.refuse("dtype", f"one of {SUPPORTED}", named(a.dtype))
    if a.channels_last and x.dim() < 2:
        entry.refuse("channels_last", "false without channels", x)


def _check(op: str, a: Any, in_place: bool) -> None:
    entry, x = Entry(op, a.input), a.input
    entry.check_batch(x, "input")
    if in_place or x.dtype != torch.uint8:
        entry.check_floats(x, "input")
    if a.index is not None:
        entry.check_vector(a.index, torch.int64, x.shape[0], "index")
    if not in_place:
        _check_result(entry, x, a)
    _check_blend(entry, x, a, x.dtype if in_place else a.dtype, "scale", "shift")
    if in_place:
        for name in ("lam", "index", "boxes", "scale", "shift"):
            entry.check_apart(x, getattr(a, name), name)


def _check_backward(op: str, a: Any) -> None:
    entry, x = Entry(op, a.grad_output), a.grad_output
    entry.check_batch(x, "grad_output")
    entry.check_floats(x, "grad_output")
    samples = x.shape[0]
    if (a.receivers is None) != (a.starts is None):
        entry.refuse("receivers and starts", "given together or not", "one of them")
    if a.receivers is not None:
        entry.check_vector(a.receivers, torch.int64, samples, "receivers")
        entry.check_vector(a.starts, torch.int64, samples + 1, "starts")
    _check_result(entry, x, a)
    _check_blend(entry, x, a, a.dtype, "scale")


# Registration


def _receivers(index: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The samples, sorted by their partner, (N,), and where those of each start, (N + 1,)."""
    if index is None:
        return None, None
    partners, receivers = index.sort(stable=True)
    samples = torch.arange(len(index) + 1, device=index.device)
    return receivers, torch.searchsorted(partners, samples)


def _adjoint(
    overload: Any,
    grad_output: Tensor,
    like: tuple[torch.dtype, bool],
    strides: Any,
    lam: Tensor | None,
    one_lam: float,
    index: Tensor | None,
    boxes: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """The share of each sample."""
    weights = (lam, one_lam, *_receivers(index), boxes, scale)
    grad_output = in_order(grad_output, watcher())
    return _BACKWARD.run_like(overload, (grad_output,), (*weights, *like))


def _fake(input: Tensor, *rest: Any) -> Tensor:
    *_, dtype, channels_last = rest
    return reference.in_format(torch.empty_like(input, dtype=dtype), channels_last)


_RESULT = "ScalarType dtype, bool channels_last"
_MIXUP = Linear(
    "mixup",
    # In the op's terms mean and std are a scale and a shift. Where lam is None, one_lam counts for
    # every sample.
    "Tensor? lam, float one_lam, Tensor? index, Tensor? boxes, Tensor? scale, Tensor? shift",
    result=_RESULT,
    like=lambda input: (input.dtype, is_channels_last(input)),
    fake=_fake,
    reference=reference.mixup,
    triton="mixup",
    check=_check,
    keeps=("lam", "index", "boxes", "scale"),
    adjoint=_adjoint,
    by_torch=formula(reference.mixup),
)
_BACKWARD = register(
    "mixup_backward",
    "(Tensor grad_output, Tensor? lam, float one_lam, Tensor? receivers, Tensor? starts, "
    f"Tensor? boxes, Tensor? scale, {_RESULT}) -> Tensor",
    fake=_fake,
    reference=reference.mixup_backward,
    triton="mixup:mixup_backward",
    route=Route(1, by_torch=formula(reference.mixup_backward)),
    check=_check_backward,
)

# Validation


def _check_input(name: str, input: Any, dtype: torch.dtype | None) -> None:
    check_tensor(name, "input", input)
    if input.dim() == 0:
        refuse(name, "input", "a batch (N, ...)", "no dimensions", ValueError)
    check_dtype(name, "input", input.dtype, and_also="uint8")
    if dtype is not None:
        check_dtype(name, "dtype", dtype, TypeError)


def _checked_lam(name: str, input: Tensor, lam: Any) -> tuple[Tensor | None, float]:
    """`lam` as the op takes it: (N,) or (1,), or a float."""
    if isinstance(lam, Tensor):
        return checked_shares(name, lam, input), 1.0
    return None, probability(name, "lam", lam)


def _check_integers(name: str, argument: str, x: Any, input: Tensor) -> None:
    check_tensor(name, argument, x)
    if x.dtype not in (torch.int64, torch.int32):
        refuse(name, argument, "int64 or int32", named(x.dtype), IndexError)
    check_device(name, argument, x, input)


def _checked_index(name: str, input: Tensor, index: Any) -> Tensor | None:
    if index is None:
        return None
    _check_integers(name, "index", index, input)
    if index.shape != input.shape[:1]:
        raise ValueError(
            f"{name}: index must name a partner for each of the {len(input)} samples, "
            f"got shape {tuple(index.shape)}"
        )
    return index.long().contiguous()


def _checked_boxes(name: str, input: Tensor, boxes: Any) -> Tensor | None:
    if boxes is None:
        return None
    _check_integers(name, "boxes", boxes, input)
    if input.dim() < 4:
        raise ValueError(
            f"{name}: input must be images (N, C, H, W) or (N, H, W), got {input.dim()} dimensions"
        )
    if boxes.shape not in ((4,), (input.shape[0], 4)):
        raise ValueError(
            f"{name}: boxes must be (4,) or ({len(input)}, 4), got shape {tuple(boxes.shape)}"
        )
    return boxes.reshape(-1, 4).long().contiguous()


def _check_values(
    name: str, input: Tensor, lam: Tensor | None, index: Tensor | None, boxes: Tensor | None
) -> None:
    """What is looked at on the CPU alone: on a GPU the kernels assert it, without a wait."""
    if lam is not None:
        check_shares(name, lam)
    if index is not None and index.numel():
        least, most = (int(value) for value in index.aminmax())
        if least < 0 or most >= len(index):
            wrong = least if least < 0 else most
            refuse(name, "index", f"in [0, {len(index)})", wrong, IndexError)
    if boxes is not None:
        height, width = input.shape[-2:]
        x1, y1, x2, y2 = boxes.unbind(1)
        fits = (x1 >= 0) & (x1 <= x2) & (x2 <= width) & (y1 >= 0) & (y1 <= y2) & (y2 <= height)
        if not bool(fits.all()):
            must = f"(x1, y1, x2, y2) with 0 <= x1 <= x2 <= {width} and 0 <= y1 <= y2 <= {height}"
            refuse(name, "boxes", must, boxes[~fits][0].tolist(), ValueError)


def _normalisation(
    name: str, input: Tensor, mean: Any, std: Any, compute: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """scale and shift such that a value v, 1/255 of a byte, becomes (v - mean) / std."""
    mean = checked_channels(name, "mean", mean, input)
    std = checked_channels(name, "std", std, input)
    if isinstance(std, tuple) and 0.0 in std:
        raise ValueError(f"{name}: std must not be 0, got {std}")
    unit = 255.0 if input.dtype == torch.uint8 else 1.0
    if mean is None and std is None and unit == 1.0:
        return None, None
    if std is None:
        std = (1.0,) * (input.shape[1] if input.dim() > 1 else 1)
    given = isinstance(mean, Tensor) or isinstance(std, Tensor)
    make = _affine if given or torch.compiler.is_compiling() or is_fake() else _kept_affine
    return make(mean, std, unit, compute, input.device)


def _affine(
    mean: Any, std: Any, unit: float, compute: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    def in_double(values: Tensor | tuple[float, ...]) -> Tensor:
        if isinstance(values, tuple) and any(map(varies, values)):
            return traced_numbers(device, *values)
        return torch.as_tensor(values, dtype=torch.float64, device=device)

    spread = in_double(std)
    shift = None if mean is None else (-in_double(mean) / spread).to(compute)
    return (1 / (unit * spread)).to(compute), shift


@functools.lru_cache(maxsize=64)
def _kept_affine(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The same, made once for a tuple of numbers: on a GPU it would be copied there each time."""
    with torch.inference_mode(False):
        return _affine(*arguments)


def _wants_channels_last(
    name: str, input: Tensor, memory_format: torch.memory_format | None
) -> bool:
    if memory_format in (None, torch.preserve_format):
        return keeps_channels_last(input)
    if memory_format == torch.contiguous_format:
        return False
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}
    if dims.get(memory_format) != input.dim():
        raise RuntimeError(
            f"{name}: memory_format {memory_format} does not fit {input.dim()} dimensions: use "
            "torch.contiguous_format"
        )
    return True


def blend(
    name: str,
    input: Tensor,
    lam: Any,
    boxes: Any,
    index: Any,
    mean: Any = None,
    std: Any = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`mixup` and `cutmix` in one: the sample's box comes from its partner, the rest is blended."""
    _check_input(name, input, dtype)
    if boxes is not None and input.dim() == 3:  # gray images: one channel
        images = input.unsqueeze(1)
        rest = (lam, boxes, index, mean, std, dtype, memory_format, inplace, backend)
        output = blend(name, images, *rest)
        return input if inplace else output.squeeze(1)
    lam, one_lam = _checked_lam(name, input, lam)
    index = _checked_index(name, input, index)
    boxes = _checked_boxes(name, input, boxes)
    looks = watcher()
    if dtype is None:
        dtype = torch.get_default_dtype() if input.dtype == torch.uint8 else input.dtype
    compute = reference.computed_in(input.dtype, dtype)
    scale, shift = _normalisation(name, input, mean, std, compute)
    channels_last = _wants_channels_last(name, input, memory_format)
    if inplace:
        if input.dtype != dtype:
            raise RuntimeError(
                f"{name}: inplace needs an output of the input's dtype, {named(input.dtype)}, "
                f"got dtype {named(dtype)}"
            )
        if channels_last != keeps_channels_last(input):
            raise RuntimeError(
                f"{name}: inplace cannot change the memory format: use inplace=False"
            )
        check_in_place(name, input)
    overload = _MIXUP.fresh.overload(input.device, dtype, backend, looks)

    def check_values() -> None:
        if shows_values(input, looks):
            if looks is not FUNC:
                _check_values(name, input, lam, index, boxes)
            if inplace:
                _check_permutation(name, index)

    x = input if looks is FUNC else in_order(input, looks)
    in_place = inplace and x is input and looks is None
    # The native op looks at the values itself, but at none where there are no elements, and a copy
    # takes any index.
    refuses = looks is None and in_place == inplace and input.numel() > 0
    refuses = refuses and implementation_of(overload) == "native"
    if not refuses:
        check_values()
    if looks is COMPILE and lam is None:
        lam, one_lam = traced_numbers(input.device, one_lam), 1.0
    weights = (lam, one_lam, index, boxes, scale, shift)
    try:
        if in_place:
            return _MIXUP.write_over(overload, input, weights)
        output = _MIXUP.call(looks, overload, (x,), (*weights, dtype, channels_last))
    except RuntimeError:
        if refuses:  # before the kernel wrote anything: say why
            check_values()
        raise
    return input.copy_(output) if inplace else output


def _check_permutation(name: str, index: Tensor | None) -> None:
    """Raises unless each sample is somebody's partner once."""
    if index is not None and not torch.equal(
        index.sort().values, torch.arange(len(index), device=index.device)
    ):
        raise ValueError(
            f"{name}: inplace needs an index that is a permutation: a sample that is read twice "
            "would be overwritten before"
        )


def mixup(
    input: Tensor,
    lam: Tensor | float,
    index: Tensor | None = None,
    *,
    mean: Tensor | Sequence[float] | float | None = None,
    std: Tensor | Sequence[float] | float | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Blends each sample with its partner, normalises it and casts it, in one pass.

    The result is :math:`(y_n - \mathrm{mean}_c) / \mathrm{std}_c` of :math:`y_n = \lambda_n x_n +
    (1 - \lambda_n) x_{\mathrm{index}[n]}`.

    Args:
        input: a batch (N, ...), with the channels second where `mean` or `std` is given; float64,
            float32, float16, bfloat16 or uint8. A byte stands for a multiple of 1/255, as in
            torchvision's `ToDtype(scale=True)`.
        lam: the weight of the sample itself, in [0, 1]: a number, or a tensor of one element or of
            shape (N,).
        index: the partner of each sample, (N,), int64 or int32, in any order and more than once.
            None reverses the batch, which suits a shuffled one.
        mean: the mean of each channel, (C,), or one number for all; None stands for 0. Numbers are
            copied to a GPU once, a tensor that is elsewhere at each call.
        std: the deviation of each channel, in the same way; None stands for 1.
        dtype: the dtype of the result. None takes the input's, and torch's default dtype for bytes.
        memory_format: the format of the result: `torch.contiguous_format`, `torch.channels_last` or
            `torch.channels_last_3d`. None takes the input's.
        inplace: True writes over `input` and returns it. `index` must then be a permutation, and
            dtype and memory format stay the input's. A compiled program makes a copy and takes any
            index.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of the input's shape. Its gradient goes to the input alone.

    Raises:
        ValueError: `lam` is outside [0, 1]; an argument has a wrong shape; `inplace` has an index
            that is no permutation; or `backend` is unknown.
        IndexError: a partner is not in [0, N).
        TypeError: an argument is no tensor or number where one is needed.
        RuntimeError: a dtype or device is another one, `lam` requires grad, or `backend` cannot run
            here.

    On a GPU the kernel looks at the values of `lam` and `index`, so that nobody waits: a wrong
    value is a device-side assertion there. A lambda of exactly 1 keeps the sample as it is, and one
    of 0 takes its partner, whatever the other holds. 16-bit floats and bytes are computed in
    float32 and rounded once.

    Source: H. Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018.
    """
    if has_torch_function_unary(input):
        return hand_over(mixup, locals(), "input", by_place=3)
    normalisation = (mean, std, dtype, memory_format, inplace, backend)
    return blend("mixup", input, lam, None, index, *normalisation)


def cutmix(
    input: Tensor,
    boxes: Tensor,
    index: Tensor | None = None,
    *,
    mean: Tensor | Sequence[float] | float | None = None,
    std: Tensor | Sequence[float] | float | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Pastes a box of its partner into each image, normalises it and casts it, in one pass.

    The result is :math:`(x_{j(n)} - \mathrm{mean}) / \mathrm{std}` inside of the box of sample
    :math:`n`, with its partner :math:`j(n)`, and :math:`(x_n - \mathrm{mean}) / \mathrm{std}`
    outside of it.

    Args:
        input: images (N, C, H, W) or (N, H, W), or (N, C, ..., H, W), of the dtypes of `mixup`.
        boxes: (N, 4), or (4,) for all images alike, int64 or int32: (x1, y1, x2, y2) are the
            columns x1 to x2 - 1 and the rows y1 to y2 - 1, with 0 <= x1 <= x2 <= W and 0 <= y1 <=
            y2 <= H. Where the two are equal the box is empty, and the image stays as it is.
        index: the partner of each image, as in `mixup`.
        mean: the mean of each channel, as in `mixup`.
        std: the deviation of each channel, as in `mixup`.
        dtype: the dtype of the result, as in `mixup`.
        memory_format: the format of the result, as in `mixup`.
        inplace: True writes over `input`, as in `mixup`.
        backend: "native", "triton" or "reference"; None takes the first that can run here.

    Returns:
        A tensor of the input's shape. The lambda of a label is the share of the image outside the
        box: 1 - (x2 - x1) (y2 - y1) / (W H). The gradient goes to the input alone.

    Raises:
        ValueError: a box is outside the image or inverted, and what else `mixup` raises it for.
        IndexError, TypeError, RuntimeError: as in `mixup`.

    Source: S. Yun et al., "CutMix: regularization strategy to train strong classifiers with
    localizable features", ICCV 2019.
    """
    if has_torch_function_unary(input):
        return hand_over(cutmix, locals(), "input", by_place=3)
    check_tensor("cutmix", "boxes", boxes)
    normalisation = (mean, std, dtype, memory_format, inplace, backend)
    return blend("cutmix", input, 1.0, boxes, index, *normalisation)
