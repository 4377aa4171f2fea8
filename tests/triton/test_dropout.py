"""Dropout's Triton kernels ahead of time: every architecture, no spills, wide accesses."""

import pytest

from aot import compile_kernel, targets

pytest.importorskip("triton")

DTYPES = ["fp64", "fp32", "fp16", "bf16"]
SHARED = {
    "x_ptr": "*{dtype}",
    "y_ptr": "*{dtype}",
    "element_offset": "i64",
    "p": "fp64",
    "seed": "i64",
    "offset": "i64",
}
KERNELS = {
    "elements_kernel": ({"numel": "i64"}, {"LEAD": 0, "BLOCK": 2048}),
    "rows_kernel": (
        {"R": "i32", "L": "i32", "stride_r": "i32", "stride_l": "i32"},
        {"BLOCK_R": 8, "BLOCK_L": 256},
    ),
}


@pytest.mark.parametrize(("dtype", "architecture"), targets(DTYPES, ["fp64", "bf16"]))
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spilling(kernel, dtype, on_device, architecture):
    arguments, constants = KERNELS[kernel]
    pointers = {"p_ptr": "*fp64", "state_ptr": "*i64"}
    constants = {"TAG": 1, "READS_DROPPED": True, "residual_ptr": None, **constants}
    constants["VALUES"] = "reg_kernels.triton.dropout:dropout_values"
    result = compile_kernel(
        f"reg_kernels.triton._elementwise:{kernel}",
        {k: v.format(dtype=dtype) for k, v in SHARED.items()}
        | arguments
        | (pointers if on_device else {}),
        constants if on_device else constants | dict.fromkeys(pointers),
        architecture,
        divisible=("x_ptr", "y_ptr", "numel"),
    )
    assert result["stack"] == 0
    if kernel == "elements_kernel":
        # 16 bytes a thread and access, not element by element.
        assert result["widest_load"] == 128
        assert result["widest_store"] == 128
