"""Compiling a Triton kernel for a GPU that is not there.

It happens in a process of its own, since this one may have TRITON_INTERPRET set; that process stays
up and answers one request a line, because importing triton takes longer than compiling.
"""

from __future__ import annotations

import atexit
import base64
import functools
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from sass.binary import resources

ARCHITECTURES = [80, 90, 100]


def compile_kernel(
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    divisible: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Compiles "module:kernel"; returns stack bytes, registers and the widest accesses in bits.

    `constants` may be named tuples, and "module:function" for a function. `divisible` names the
    arguments that may be taken for multiples of 16.
    """
    worker = _worker()
    request = [kernel, signature, constants, architecture, list(divisible)]
    worker.stdin.write(base64.b64encode(pickle.dumps(request)).decode() + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"the compiling process ended: {worker.stderr.read()}")
    result = json.loads(answer)
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


@functools.cache
def _worker() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    worker = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    atexit.register(worker.kill)
    return worker


def _compile(
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    divisible: list[str],
) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _named(kernel)
    constants = {n: _named(c) if ":" in str(c) else c for n, c in constants.items()}
    types = {n: signature.get(n, "constexpr") for n in function.arg_names}
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(function.arg_names)
            if argument in divisible
        },
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((registers, stack, _),) = resources(Path(file.name)).values()
    return {
        "stack": stack,
        "registers": registers,
        "widest_load": _widest(compiled.asm["ptx"], "ld"),
        "widest_store": _widest(compiled.asm["ptx"], "st"),
    }


def _named(name: str) -> Any:
    """What "module:name" names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _widest(ptx: str, access: str) -> int:
    found = re.findall(rf"\b{access}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(vector or 1) * int(bits) for vector, bits in found), default=0)


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            reply = _compile(*pickle.loads(base64.b64decode(line)))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
