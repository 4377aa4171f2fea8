"""Programs and arguments that the op `augment` refuses, with what it says of them."""

import math
import re

import pytest
import torch

from reg_kernels._augment_program import ARGUMENTS, RANGES, WIDTH, Axes, Op, column, instruction
from reg_kernels.ops.augment import run

from augment_programs import on_each
from support import DEVICE

do = instruction


def changed(op, **named):
    """A valid instruction of an op with other arguments."""
    valid = {
        Op.BOX: do(Op.BOX, 0, 0, 5, 6, 5, 6),
        Op.WARP: do(Op.WARP, 1, 0, 0, 0, 1, 0, 0, 0, 1, 5, 6),
    }
    row = list(valid.get(op, do(op)))
    for name, value in named.items():
        row[column(op, name)] = value
    return row


def refusals():
    """(row, what is said of it): outside of each range on both sides, and between whole numbers."""
    for (op, name), allowed in RANGES.items():
        values = [allowed.lowest - 1, *allowed.but]
        values += [allowed.highest + 1] if allowed.highest < math.inf else []
        values += [allowed.lowest + 0.5] if allowed.whole else []
        for value in values:
            got = f"{op.name} with {name} {allowed}, got {name} {value:g} in instruction 1 of"
            yield changed(op, **{name: value}), got
    for op in Op:
        for name in ARGUMENTS[op][:1]:
            yield changed(op, **{name: math.nan}), "of finite numbers"
            yield changed(op, **{name: -math.inf}), "of finite numbers"
    for code in (-1.0, 24.0, 2.5, 1e30):
        row = [code] + [0.0] * (WIDTH - 1)
        yield row, f"of opcodes from 0 to 23, got {code:g} in instruction 1 of sample 0"
    for region in ((-1, 0, 5, 6), (0, -1, 5, 6), (0, 0, 6, 6), (0, 0, 5, 7), (5, 0, 1, 1)):
        yield do(Op.BOX, *region, 5, 6), "BOX of a region inside of the image, or a pad, got"
        if min(region) >= 0:
            yield do(Op.ERASE, *region), "ERASE of a region inside of the image, got ERASE in"
    yield do(Op.BLUR, Axes.BOTH, 5), "BLUR with a radius below the image's sides, got BLUR in"
    yield do(Op.BLUR, Axes.VERTICAL, 5), "BLUR with a radius below"
    yield do(Op.BLUR, Axes.HORIZONTAL, 6), "BLUR with a radius below"
    yield do(Op.JOIN, 1), "JOIN and MIX between a SAVE and its MIX alone, got JOIN in"
    yield do(Op.MIX), "JOIN and MIX between a SAVE and its MIX alone, got MIX in"
    yield do(Op.BOX, 0, 0, 5, 6, 5, 7), "such that images of (5, 6) result, got (5, 7) for"


def refused(message, backend="reference", **changes):
    given = {
        "pixels": torch.rand(2 * 90, device=DEVICE),
        "images": torch.tensor([[0, 5, 6], [90, 5, 6]]),
        "program": torch.zeros(2, 1, WIDTH),
        "channels": 3,
        "channels_last": False,
        "height": 5,
        "width": 6,
        "dtype": torch.float32,
        "result_channels_last": False,
        "exact": False,
    } | changes
    before = given["pixels"].clone() if isinstance(given["pixels"], torch.Tensor) else None
    with pytest.raises(RuntimeError, match=f"^augment: {message}") as caught:
        run(*given.values(), backend=backend)
    assert "\n" not in str(caught.value)
    assert torch.equal(given["pixels"], before)


@on_each
def test_programs_that_are_refused(backend):
    for row, message in refusals():
        program = torch.tensor([[do(Op.NONE), row], [do(Op.NONE), do(Op.NONE)]])
        refused(f"program must be {re.escape(message)}", backend, program=program)


@on_each
def test_sizes_that_change_between_save_and_mix_are_refused(backend):
    rows = [do(Op.SAVE, 1), do(Op.BOX, 0, 0, 5, 6, 4, 6), do(Op.BOX, 0, 0, 4, 6, 5, 6), do(Op.MIX)]
    message = "program must be a size that stays between a SAVE and its MIX, got BOX in instruction"
    refused(f"{message} 1 of sample 1", backend, program=torch.tensor([[do(Op.NONE)] * 4, rows]))


@on_each
@pytest.mark.parametrize(
    ("op", "channels", "counts"),
    [
        (Op.CONTRAST, (2, 4), "1 or 3"),
        *((op, (1, 2, 4), "3") for op in (Op.SATURATION, Op.HUE, Op.GRAYSCALE, Op.PERMUTE)),
    ],
)
def test_other_channels_than_an_instruction_has(op, channels, counts, backend):
    for count in channels:
        refused(
            f"program must be {op.name} only for {counts} channels, not {count}, got {op.name} in",
            backend,
            channels=count,
            pixels=torch.rand(400, device=DEVICE),
            program=torch.tensor([[do(op)], [do(Op.NONE)]]),
        )


@on_each
def test_arguments_that_are_refused(backend):
    def check(message, **changes):
        refused(message, backend, **changes)

    for images in ([-1, 5, 6], [91, 5, 6], [0, 0, 6], [0, 5, 65536], [2**62, 5, 6], [0, 5, -6]):
        message = r"images must be \(offset, height, width\) with sides in \[1, 65535\] of images"
        check(message, images=torch.tensor([[0, 5, 6], images]))
    check("images must be contiguous int64 of shape", images=torch.zeros(2, 3))
    check("images must be contiguous int64 of shape", images=torch.zeros(6, dtype=torch.int64))
    check("program must be contiguous float32 of shape", program=torch.zeros(2, 1, 15))
    check("program must be contiguous float32", program=torch.zeros(2, 1, WIDTH).double())
    check("program must be of as many samples as images, 2, got 3", program=torch.zeros(3, 1, 16))
    check("pixels must be one contiguous dimension", pixels=torch.rand(2, 90, device=DEVICE))
    check("pixels must be one contiguous dimension", pixels=torch.rand(360, device=DEVICE)[::2])
    check("pixels must be one of", pixels=torch.zeros(180, dtype=torch.int16, device=DEVICE))
    check("dtype must be one of", dtype=torch.int8)
    check(r"channels must be in \[1, 4\], got 5", channels=5)
    check(r"height must be in \[1, 65535\], got 0", height=0)
    check(r"width must be in \[1, 65535\], got 65536", width=65536)
    check("exact must be false but for pixels of uint8, got float32", exact=True)
    check(r"program must be such that images of \(4, 6\) result", height=4)
    check(r"program must be such that images of \(4, 6\)", height=4, program=torch.zeros(2, 0, 16))
