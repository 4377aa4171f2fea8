"""The command line: `reg-kernels`, also `python -m reg_kernels`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import backends
from ._errors import UsageError

# Each names a module here that has SUMMARY, add_arguments(parser) and run(args) -> exit code.
COMMANDS = ("info", "check", "bench", "train")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reg-kernels",
        description="Fused regularisation kernels for PyTorch: what runs here and how well.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 success, 1 a check failed, 2 bad input, 130
    interrupted."""
    args = build_parser().parse_args(argv)
    try:
        check_forced()
        return args.run(args)
    except UsageError as error:
        print(f"reg-kernels {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"reg-kernels {args.command}: interrupted", file=sys.stderr)
        return 130


def check_forced() -> None:
    """REG_KERNELS_BACKEND is input too: a name that is none is found before the work starts."""
    if (name := backends.forced_by()) not in (None, *backends.NAMES):
        expected = ", ".join(backends.NAMES)
        raise UsageError(f"REG_KERNELS_BACKEND must be one of {expected}, got {name!r}")
