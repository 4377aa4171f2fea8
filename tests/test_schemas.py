"""The ops' declarations for programs without Python are those that Python makes.

`python tests/test_schemas.py` writes csrc/schemas.inc anew.
"""

from pathlib import Path

import reg_kernels  # noqa: F401  (declares the ops)
from reg_kernels.ops._registry import NATIVE_SCHEMAS

FILE = Path(__file__).parents[1] / "csrc" / "schemas.inc"


def text() -> str:
    lines = []
    for schema in sorted(NATIVE_SCHEMAS):
        words, line = schema.split(" "), ""
        pieces = []
        for word in words:
            if len(line) + len(word) > 90:
                pieces.append(line)
                line = ""
            line += f"{word} "
        pieces.append(line[:-1])
        lines.append("\n    ".join(f'"{piece}"' for piece in pieces) + ",\n")
    return "".join(lines)


def test_schemas_inc_is_what_python_declares():
    assert FILE.read_text() == text(), "run: python tests/test_schemas.py"


if __name__ == "__main__":
    FILE.write_text(text())
