"""The type that a kernel computes in."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.constexpr_function
def compute_type(*dtypes: Any) -> Any:
    """float64 where one of them is, else float32."""
    return tl.float64 if tl.float64 in dtypes else tl.float32
