"""Which part of a batch this process has, where several train on one batch together.

The batch of all ranks is theirs one behind the other, in the order of ranks. A call that draws
looks here where its sample is in it, and so draws what one process with the whole batch would have
drawn there. `reg_kernels.distributed` is what users state a part by.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._compiler import not_compiled
from ._numbers import refuse


class Part(NamedTuple):
    """A rank's part of a batch."""

    first: int  # samples of the ranks before it
    total: int  # samples of all ranks
    samples: int | None  # of this rank; None: as many as each tensor has in its first dimension
    alike: bool = False  # what is drawn is no part of anything, and the same on all ranks

    def rows(self, op: str, shape: Sequence[int], argument: str = "input") -> Part:
        """The part that a tensor of this rank is, counted in its first dimension's places, of which
        each sample has as many; raises where that cannot be."""
        rows = shape[0] if len(shape) else 0
        samples = rows if self.samples is None else self.samples
        if self.alike or (rows == samples and len(shape)):
            return Part(self.first, self.total, rows, self.alike)
        if samples == 0 or rows == 0 or rows % samples:
            must = (
                f"of a first dimension that is a multiple of this rank's {samples} samples: put "
                "the batch first, or call it `with reg_kernels.distributed.whole():`, which draws "
                "the same on all ranks"
            )
            refuse(op, argument, must, f"shape {tuple(shape)}")
        each = rows // samples
        return Part(self.first * each, self.total * each, rows)

    def offset(self, op: str, shape: Sequence[int], dims: int | None = None) -> int:
        """How many draws the ranks before this one make for tensors like one of this shape.

        Args:
            op: who asks, for its error.
            shape: of this rank's tensor, which has elements.
            dims: how many leading dimensions have a draw for each place; None: all.
        """
        if self.alike:
            return 0
        draws = self.rows(op, shape).first
        for size in shape[1:dims]:
            draws *= size
        return draws

    def draws_nothing_alone(self, shape: Sequence[int]) -> bool:
        """Whether a tensor is empty because this rank has no samples, and others have some."""
        none = self.samples == 0 or self.samples is None
        return none and self.total > 0 and [*shape].count(0) == 1


class Sharding(Protocol):
    """What tells a rank's part of a batch of which it has so many samples."""

    def part(self, samples: int) -> Part: ...


# Whether any part was ever stated in this process. It is all that a call reads otherwise.
used = False


class _Here(threading.local):
    """The part that is in force in a thread, and what the callers of sharded modules had."""

    part: Part | None = None

    def __init__(self) -> None:
        self.entered: list[tuple[Any, Part | None]] = []


class _Compiled:
    """The same once more for compiled programs, which have guards on this and on no thread's own:
    they are compiled anew for another part."""

    part: Part | None = None


_here = _Here()
_compiled = _Compiled()


def current() -> Part | None:
    """The part in force."""
    return _compiled.part if torch.compiler.is_compiling() else _here.part


def _put(part: Part | None) -> None:
    global used
    used = True
    _here.part = _compiled.part = part


@not_compiled
def enter(who: Any, part: Part) -> None:
    """Puts a part in force until `leave(who)`."""
    _here.entered.append((who, _here.part))
    _put(part)


@not_compiled
def leave(who: Any) -> None:
    """Puts the part in force that was when `who` entered; does nothing if `who` has not."""
    if _here.entered and _here.entered[-1][0] is who:
        _put(_here.entered.pop()[1])


class Stated:
    """Puts a part in force inside of it; a compiled program may have it inside."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._outside: Part | None = None

    def __enter__(self) -> Part:
        self._outside = current()
        _put(self.part)
        return self.part

    def __exit__(self, *error: object) -> None:
        _put(self._outside)


# Checkpointing calls a part of a model again, in a backward, where no part is in force any more or
# another one is. It puts the generator where it was, so a call finds its part by what it draws.

_MOST = 2**14  # draws between a forward and its backward; a draw takes some 300 bytes
_parts: dict[Hashable, Part] = {}
_adding = threading.Lock()


def of_draw(state: Tensor) -> Part | None:
    """The part for a call that has drawn this `rng_state`."""
    if torch.compiler.is_compiling():
        return _compiled.part
    if state.device.type != "cpu" or _has_no_values():
        return _here.part
    return _remembered(lambda: tuple(state.tolist()))


def offset_of(op: str, shape: Sequence[int], state: Tensor) -> int:
    """The place of the first draw of a call that has drawn this `rng_state` for each element of a
    tensor whose samples lie one behind the other."""
    part = of_draw(state)
    return 0 if part is None else part.offset(op, shape)


def of_order(device: torch.device) -> Part | None:
    """The part for a call that is about to draw from torch's generator of a device."""
    if torch.compiler.is_compiling():
        return _compiled.part
    return _remembered(lambda: (device, *_upcoming(device)))


def _has_no_values() -> bool:
    """Whether no number of a tensor can be looked at, beside while a CUDA graph is captured, which
    has states on the device."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _remembered(key_of: Callable[[], Hashable]) -> Part | None:
    part = _here.part
    if part is None and not _parts:
        return None
    key = key_of()
    if torch._C._current_graph_task_id() != -1:  # in a backward
        return _parts.get(key, part)
    with _adding:
        _parts.pop(key, None)  # of an earlier call by the same seed
        if part is not None:
            if len(_parts) >= _MOST:
                del _parts[next(iter(_parts))]
            _parts[key] = part
    return part


def _upcoming(device: torch.device) -> list[int]:
    """Numbers that a generator's state is known by, which stays as it is."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    generator = generator.clone_state()
    return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator).tolist()


def of_batch(sharding: Sharding | None, op: str, samples: int) -> Part | None:
    """The part that a batch is to what draws for each of its samples by itself: the one in force,
    or the one that it is sharded by; None where the batch is a whole one."""
    part = current() if used else None
    if part is not None:
        return None if part.alike else part.rows(op, (samples,))
    return None if sharding is None else sharding.part(samples)


def of_model(model: Any, samples: int) -> AbstractContextManager[Part | None]:
    """Puts the part in force that a batch is for all the calls that are made inside of a model that
    is sharded, or wraps one, and is training: the sizes of the others' parts are asked for once."""
    part = current() if used else None
    if part is None and isinstance(model, torch.nn.Module):
        owners = (m for m in model.modules() if "_sharding" in m.__dict__ and m.training)
        owner: Any = next(owners, None)
        part = None if owner is None else owner._sharding.part(samples)
    if part is None:
        return nullcontext()
    return Stated(part if part.alike else part._replace(samples=samples))
