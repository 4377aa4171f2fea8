"""The step of AdamW, Adam, SGDW and SGD on a table of tensors in Triton.

AdamW reads p, g, m, v and writes p, m, v: 3 * sizeof(T) + 4 * sizeof(S) bytes an element with
moments of type S (28 B in fp32, 14 B in bf16, 22 B in bf16 with fp32 moments); SGDW with momentum
five arrays, without three; amsgrad, an EMA and Kahan's compensation two more each. Of what has no
gradient an EMA alone reads p and itself and writes itself.

One launch for the whole table, a program for each chunk. Which arrays there are only the table
knows, on the device: accesses to one that is not there are masked off or branched around, and move
nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import device_of, state_arguments
from ._optimizer_chunk import NUMBERS, StepForm, add_steps, group_of, step_chunk, store_group
from ._optimizer_rule import ADAM, KAHAN, RATE_ON_DEVICE, STOCHASTIC, gradient_factor
from ._table import chunks_of, is_last_program, type_of

REST = 256  # elements at a time of what cannot be moved in vectors
STEPS = 256  # that the last program adds to at a time
# No recompiling by value, nor by the alignment of single numbers.
UNSPECIALISED = [
    *("count", "chunks", "flags", "squares_count", "seed", "offset", "groups_ptr", "rates_ptr"),
    *("squares_ptr", "grad_scale_ptr", "found_inf_ptr", "state_ptr", "number"),
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def optimizer_step_kernel(
    table_ptr,
    count,
    chunks,
    lr: tl.float64,
    decay_lr: tl.float64,
    weight_decay: tl.float64,
    l1: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    ema_decay: tl.float64,
    flags,
    groups_ptr,  # float64 [groups, 9], or None: then all are of the group that stands above
    rates_ptr,  # float32: the lr of groups that have RATE_ON_DEVICE set is a place here; or None
    squares_ptr,  # float64 [squares_count], or None
    squares_count,
    max_norm: tl.float64,
    grad_scale_ptr,  # float32 [1], or None
    found_inf_ptr,  # likewise
    state_ptr,
    seed: tl.int64,
    offset: tl.int64,
    scratch_ptr,
    FORM: tl.constexpr,
):
    proceeds = True
    if found_inf_ptr is not None:
        proceeds = tl.load(found_inf_ptr) == 0.0  # else no program takes a ticket
    if proceeds:
        if tl.program_id(0) < chunks:
            group = group_of((lr, decay_lr, weight_decay, l1, beta1, beta2, eps, ema_decay), flags)
            factor = gradient_factor(squares_ptr, squares_count, max_norm, grad_scale_ptr)
            step_chunk(
                *(table_ptr, count, group, groups_ptr, rates_ptr, factor),
                *(state_ptr, seed, offset, FORM),
            )
        if is_last_program(scratch_ptr):
            add_steps(table_ptr, count, FORM.STEPS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def write_group_kernel(
    groups_ptr,  # float64 [groups, 9], a row of which is written
    number,
    lr: tl.float64,
    decay_lr: tl.float64,
    weight_decay: tl.float64,
    l1: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    ema_decay: tl.float64,
    flags,
):
    group = group_of((lr, decay_lr, weight_decay, l1, beta1, beta2, eps, ema_decay), flags)
    store_group(groups_ptr, number, group)


def _block(algorithm: int, dtype: tl.dtype, moments: tl.dtype, rounding: int) -> int:
    """Elements at a time, such that nothing spills: tests/triton_kernels/test_launches.py.

    Adam takes 54 to 79 registers a thread and SGD 45 to 61, in float64 up to 104: three programs of
    256 threads and more on a multiprocessor, two in float64.
    """
    if dtype == tl.float64:
        return 1024 if algorithm == ADAM.value else 2048
    narrow = algorithm == ADAM.value and tl.float32 not in (dtype, moments)
    return 2048 if narrow and rounding != KAHAN.value else 1024


def _group_rows(numbers: list[float], flags: list[int]) -> list[list[float]]:
    """The numbers of each group; an lr that is on the device is its place among `rates`."""
    rows, rates = [], 0
    for i, word in enumerate(flags):
        row = list(numbers[NUMBERS * i : NUMBERS * (i + 1)])
        if word & RATE_ON_DEVICE.value:
            row[0] = float(rates)
            rates += 1
        rows.append(row)
    return rows


def _on_device(
    rows: list[list[float]], flags: list[int], device: torch.device, capturing: bool
) -> Tensor:
    """The groups as float64 [groups, 9]."""
    if not capturing:
        table = [[*row, float(word)] for row, word in zip(rows, flags, strict=True)]
        # From memory that is not pinned: the driver has taken it when this returns, and waits for
        # nothing.
        return torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True)
    # A graph would copy from the host's memory again at its replays; a kernel's arguments it keeps.
    groups = torch.empty(len(rows), NUMBERS + 1, dtype=torch.float64, device=device)
    for i, row in enumerate(rows):
        write_group_kernel[(1,)](groups, i, *row, flags[i], num_warps=1)
    return groups


def optimizer_step_table(
    table: Tensor,
    count: int,
    _seal: int,
    algorithm: int,
    dtypes: list[int],
    numbers: list[float],
    flags: list[int],
    rates: list[Tensor],
    rounding: int,
    squares: Tensor | None,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rng_state: Tensor | None,
    scratch: Tensor,
) -> None:
    """The op's step of the tensors in `table`."""
    if count == 0:
        return
    chunks = chunks_of(table, count)
    dtype, moments = map(type_of, dtypes)
    # Only a bfloat16 is rounded by chance, and what has 16 bits compensated.
    narrow = (tl.bfloat16,) if rounding == STOCHASTIC.value else (tl.bfloat16, tl.float16)
    if dtype not in narrow:
        rounding = 0
    block = _block(algorithm, dtype, moments, rounding)
    form = StepForm(algorithm, dtype, moments, rounding, block, REST, STEPS)
    rows = _group_rows(numbers, flags)
    with device_of(table):
        groups, rate = None, None
        if len(rows) > 1:
            capturing = table.is_cuda and torch.cuda.is_current_stream_capturing()
            groups = _on_device(rows, flags, table.device, capturing)
        if rates:
            rate = rates[0] if len(rates) == 1 else torch.stack([r.reshape(()) for r in rates])
        # Tensors without an element count their steps too: there is a program for that at least.
        optimizer_step_kernel[(max(chunks, 1),)](
            *(table, count, chunks, *rows[0], flags[0], groups, rate),
            *(squares, 0 if squares is None else squares.numel(), max_norm),
            *(grad_scale, found_inf, *state_arguments(rng_state), scratch, form),
            num_warps=8,
        )
