"""Settings that have to stand before triton is imported, and one seed for every test."""

import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def _patch_the_language_once_a_launch() -> None:
    """Spares Triton's interpreter what it does over and over.

    A launch puts its own functions into triton.language and takes them out again. Each call of a
    helper inside a kernel, tl.sum included, searches all of the language once more for what is
    left to do, which is nothing: a millisecond, and most of a kernel is helpers.
    """
    try:
        from triton.runtime import interpreter

        patch, scope = interpreter._patch_lang, interpreter._LangPatchScope
        language = interpreter.tl
    except (ImportError, AttributeError):  # no triton, or one that does it otherwise
        return

    @functools.cache
    def names_of(function: Any) -> list[Any]:
        """The modules by which the function knows the language."""
        known = (language, language.core)
        return [m for m in known if any(m is v for v in function.__globals__.values())]

    def patch_once(function: Any) -> Any:
        found = names_of(function)
        if found and not any(language.core.is_builtin(m.load) for m in found):
            return scope()
        return patch(function)

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    _patch_the_language_once_a_launch()


# Inductor takes what it has compiled whatever the instruction set was, from a folder that outlives
# the tests: a program for AVX-512, run with AVX2's vectors, writes half of its values.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}",
)

# Under `pytest -n`. What a test starts is no worker: pytest-benchmark would time nothing there.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    torch.set_num_threads(1)  # the processes have the cores already


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch shares out even small inputs, and its threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_its_own() -> Iterator[None]:
    """What a file's tests compile does not count towards the limits of another one's: which files
    share a process is a matter of chance, and all of torch's own layers share one limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
