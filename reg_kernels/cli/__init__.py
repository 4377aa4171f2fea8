"""The command line: `reg-kernels`, also `python -m reg_kernels`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import select
import sys
from collections.abc import Collection, Sequence
from typing import NamedTuple, NoReturn

from .. import __version__, _extras, backends
from ._errors import CUT_OFF, INTERRUPTED, UsageError, said


class Command(NamedTuple):
    """A module here that has add_arguments(parser) and run(args) -> exit code."""

    summary: str
    extra: str | None  # what has to be installed for it


COMMANDS = {
    "info": Command("torch, devices, and which implementation runs here and why", None),
    "check": Command(
        "errors of every op against the fp64 reference, and gradcheck; exit 1 if one is over", "cli"
    ),
    "bench": Command("time against PyTorch eager, torch.compile and a copy; --json, --plot", "cli"),
    "augment": Command("draw what a pipeline of augmentation does to images", "augment"),
    "train": Command("train a small net plain and regularised, and compare", "train"),
    "compare": Command(
        "train with and without each method of regularisation, over seeds", "compare"
    ),
    "tune": Command("search the strengths of methods for a recipe that does better", "compare"),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        text = f"{self.prog}: {message}; see {self.prog} --help\n"
        self.exit(2, text if _speaks() else None)


def _speaks() -> bool:
    """Whether this process is the one to say what is wrong of all that torchrun has started on this
    host with the same words."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def build_parser(chosen: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser, which knows the arguments of the chosen commands. The other commands need not
    even be importable."""
    parser = _Parser(
        prog="reg-kernels",
        description="Fused regularisation kernels for PyTorch: what runs here and how well.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, extra) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in chosen:
            if extra is not None:
                _extras.require("it", extra)
            module = importlib.import_module(f".{name}", __name__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _is_cut_off() -> bool:
    """Whether nobody reads the output any more, as behind `| head`."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 a check failed, 2 bad input, 130
    interrupted, 141 its output was cut off."""
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        args, unknown = build_parser([command] if command else []).parse_known_args(words)
        if unknown:
            which = _Parser(prog=f"reg-kernels {command}")
            which.error(f"unrecognized arguments: {' '.join(unknown)}")
        check_forced()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (UsageError, _extras.MissingExtra) as error:
        if _speaks():
            print(f"reg-kernels {command}: {said(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _is_cut_off():  # another pipe, as to a process of ours
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's end would fail
        return CUT_OFF
    except KeyboardInterrupt:
        print(f"reg-kernels {command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def check_forced() -> None:
    """REG_KERNELS_BACKEND is input too: a name that is none is found before the work starts."""
    if (name := backends.forced_by()) not in (None, *backends.NAMES):
        expected = ", ".join(backends.NAMES)
        raise UsageError(f"REG_KERNELS_BACKEND must be one of {expected}, got {name!r}")
