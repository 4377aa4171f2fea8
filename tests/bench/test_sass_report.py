"""bench/sass_report.py: reading disassembly, the arithmetic of the bound, and the table itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.sass import binary, compiling, render, table, triton_launches
from bench.sass.disassembly import Hot, elements_alone, functions, hot_paths
from bench.sass.findings import EXPLAINED, findings
from bench.sass.gpus import GPUS, cycles, occupancy, share_of_bandwidth

import toolchain

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def listing(*lines: str) -> Any:
    """The function of a listing as nvdisasm prints one; a line is a label or an instruction."""
    text = ["\t.section\t.text.f", ".text.f:"]
    for at, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * at:04x}*/       {line} ;")
    (function,) = functions("\n".join(text))
    assert function[0] == "f"
    return function[1]


LOOP = (
    "S2R R0, SR_TID.X",
    "@!P1 BRA `(.L_x_2)",
    ".L_x_1:",
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
    "FFMA R4, R4, R8, R9",
    "I2F R5, R5",
    "STG.E.128 desc[UR4][R6.64], R4",
    "IADD3 R2, R2, 0x10, RZ",
    "@P0 BRA `(.L_x_1)",
    ".L_x_2:",
    "@!P0 BRA `(.L_x_3)",
    ".L_x_4:",
    "LDG.E.U16 R4, desc[UR4][R2.64]",
    "STG.E.U16 desc[UR4][R6.64], R4",
    "@P0 BRA `(.L_x_4)",
    ".L_x_3:",
    "EXIT",
)


def test_the_loop_of_the_widest_accesses_is_the_hot_one():
    (hot,) = hot_paths(listing(*LOOP))
    assert hot.loop and hot.inner_loops == 0
    assert hot.accesses == hot.streamed == (("load", 16, 1), ("store", 16, 1))
    kinds = {"integer": 1, "float": 1, "conversion": 1, "memory": 2, "control": 1}
    assert hot.kinds == kinds and hot.instructions == 6
    assert hot.pipes == {"alu": 1, "conversion": 1, "fp32": 1, "issue": 1, "lsu": 2}


def test_without_a_loop_the_whole_of_the_wide_path_counts():
    (hot,) = hot_paths(
        listing(
            "S2R R0, SR_TID.X",
            "@P3 LDG.E.64 R20, desc[UR4][R8.64]",  # a state that may be on the device
            "@!P0 BRA P1, `(.L_x_1)",
            *("LDG.E.U16 R4, desc[UR4][R2.64]", "LDG.E.U16 R5, desc[UR4][R2.64+0x2]"),
            "BRA `(.L_x_2)",
            ".L_x_1:",
            "LDG.E.128 R4, desc[UR4][R2.64]",
            ".L_x_2:",
            "@P2 BRA `(.L_x_3)",
            *("STG.E.128 desc[UR4][R2.64], R4", "EXIT"),
            ".L_x_3:",
            *("STG.E.U16 desc[UR4][R2.64], R4", "EXIT"),
        )
    )
    assert not hot.loop and hot.instructions == 7
    assert hot.accesses == (("load", 8, 1), ("load", 16, 1), ("store", 16, 1))
    assert hot.streamed == (("load", 16, 1), ("store", 16, 1)) and hot.bytes == 32


def test_an_inner_loop_that_computes_is_counted_once_and_said():
    inner = (".L_x_9:", "FADD R4, R4, R4", "@P2 BRA `(.L_x_9)")
    (hot,) = hot_paths(listing(*LOOP[:4], *inner, *LOOP[4:]))
    assert hot.loop and hot.inner_loops == 1
    assert hot.kinds["float"] == 2


def test_a_rare_path_out_of_a_loop_is_not_taken():
    call = ("@P4 BRA `(.L_x_5)", "CALL.REL.NOINC `($slow)", ".L_x_5:")
    (hot,) = hot_paths(listing(*LOOP[:4], *call, *LOOP[4:]))
    assert hot.instructions == 7  # the branch, without the call


def test_code_that_touches_no_global_memory_has_no_hot_path():
    assert hot_paths(listing("FADD R0, R0, R0", "EXIT")) == []


def a_hot(load: int, store: int, **pipes: int) -> Hot:
    accesses = (("load", 16, load), ("store", 16, store))
    return Hot(False, 0, accesses, accesses, {"integer": sum(pipes.values())}, pipes)


def test_labels_beside_the_elements_are_instructions_and_no_traffic():
    lines = listing(
        ".L_x_1:",
        "LDG.E.64 R8, desc[UR4][R2.64]",
        "LDG.E.64 R10, desc[UR4][R2.64+8]",
        ".L_x_2:",
        "LDG.E.U16 R4, desc[UR4][R2.64]",
        "@P1 BRA `(.L_x_2)",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    )
    widths = table.access_bytes("false, bfloat16>")
    assert widths == {2, 16} and table.access_bytes("0, bfloat16, float>") == {2, 4, 8, 16}
    (hot,) = hot_paths(elements_alone(lines, widths))
    assert hot.streamed == (("load", 2, 1),) and hot.instructions == 2
    (hot,) = hot_paths(lines)
    assert hot.streamed == (("load", 8, 2),)


def test_the_bound_by_hand():
    # 100 instructions: 25 clocks to issue; 64 of 16 bits of integers on 64 units: 32 clocks.
    pipes = {"alu": 64, "fp32": 20, "issue": 16}
    assert cycles(90, pipes) == (32.0, "alu")
    assert cycles(100, pipes) == (25.0, "issue")
    assert cycles(90, {"mufu": 10, "alu": 1}) == (20.0, "mufu")
    # FP32 and integer multiply-adds share units: (30 + 30) * 32 / 128, the latter alone longer.
    assert cycles(90, {"fp32": 30, "imad": 30}) == (15.0, "issue")
    assert cycles(80, {"fp32": 30, "imad": 30}) == (30.0, "fp32")
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    share, pipe = share_of_bandwidth(h100, a_hot(1, 1, **pipes))
    # 32 lanes move 1024 bytes; 3.35e12 / 132 / 1.98e9 = 12.82 bytes a clock: 79.9 clocks.
    assert share == pytest.approx(79.9 / 32, rel=1e-3) and pipe == "alu"


def test_occupancy_by_hand():
    assert occupancy(90, 32, 256, 0) == (100, "threads")
    assert occupancy(90, 128, 256, 0) == (25, "registers")
    assert occupancy(90, 129, 256, 0) == (12, "registers")  # 136: one block of the two less
    assert occupancy(90, 32, 256, 100 * 1024) == (25, "shared")
    assert occupancy(80, 32, 256, 100 * 1024) == (12, "shared")
    assert occupancy(90, 32, 32, 0) == (50, "blocks")


def committed() -> dict[str, Any]:
    return json.loads((RESULTS / "sass.json").read_text())


def test_sass_md_is_made_of_sass_json():
    assert (RESULTS / "sass.md").read_text() == render.render(committed())


def test_every_kernel_is_in_the_table():
    rows = committed()["kernels"]
    listed = {row["kernel"].split("<")[0] for row in rows}
    assert set(table.global_kernels()) - listed == set()
    sources = {row["source"].removeprefix("cuda/") for row in rows if "cuda/" in row["source"]}
    assert sources == {source.stem for source in compiling.CUDA_SOURCES}
    assert {row["architecture"] for row in rows} == set(compiling.CUDA_ARCHITECTURES)
    assert committed()["sources"].keys() == sources
    assert sorted(committed()["triton_launches"]) == triton_launches.OPS


def test_every_finding_is_explained_and_every_reason_needed():
    report = committed()
    found = [f for row in report["kernels"] + report["launches"] for f in findings(row)]
    assert [f for f in found if f.reason is None] == []
    assert {reason for _, _, reason in EXPLAINED} == {f.reason for f in found}


def compare(rows: list[dict[str, Any]], source: str, architecture: int | None = None) -> None:
    """Rows made here with those of the report: all of them where the compilers are the same, else
    what no compiler may lose."""
    report = committed()
    theirs = {
        table.key_of(row): row
        for row in report["kernels"]
        if row["source"] == source and architecture in (None, row["architecture"])
    }
    ours = {table.key_of(row): json.loads(json.dumps(row)) for row in rows}
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        if report["versions"] == table.versions():
            assert row == theirs[key], key
        else:
            assert row["stack"] == theirs[key]["stack"], key
            for ours_, theirs_ in zip(row["hot"], theirs[key]["hot"], strict=True):
                for kind in ("loads", "stores"):
                    least = [min(map(int, hot[kind]), default=0) for hot in (ours_, theirs_)]
                    assert least[0] >= least[1], key


@pytest.fixture
def tools() -> None:
    try:
        table.versions()
        binary.tool("cuobjdump"), binary.tool("nvdisasm"), binary.demangled([])
    except (compiling.Missing, ImportError) as missing:
        pytest.skip(str(missing))


def test_a_source_is_compiled_again_where_anything_of_it_has_changed(tmp_path: Path):
    include, cuda = tmp_path / "include", tmp_path / "cuda"
    include.mkdir()
    cuda.mkdir()
    source = cuda / "op.cu"
    source.write_text('#include <torch.h>\n#include "op.cuh"\nint a;')
    (cuda / "op.cuh").write_text('#if 0\n#  include "far.h"\n#endif\n#include "op.cuh"')
    (include / "far.h").write_text("int b;")
    digests = set()
    for path, text in (
        (source, source.read_text()),
        (source, '#include "op.cuh"\nint b;'),
        (include / "far.h", "int c;"),
        (cuda / "far.h", "int c;"),  # nearer than the other one
        (cuda / "op.cuh", "int d;"),
    ):
        path.write_text(text)
        digests.add(compiling.digest_of_source(source, (include, tmp_path)))
    assert len(digests) == 5
    (cuda / "far.h").write_text("int none_includes_it;")
    assert compiling.digest_of_source(source, (include, tmp_path)) in digests

    (real, *_) = compiling.CUDA_SOURCES
    report = {"versions": table.versions(), "sources": {real.stem: "older"}}
    assert not table.is_current(report, real)
    report["sources"][real.stem] = compiling.digest_of_source(real)
    assert table.is_current(report, real)
    assert not table.is_current(report | {"versions": {"nvcc": "1.0"}}, real)


# tests/emulation/test_nvcc.py compiles the same, and what it made is taken from there.
@pytest.mark.parametrize("source", compiling.CUDA_SOURCES, ids=lambda source: source.stem)
def test_the_table_of_cuda_kernels_holds(source, tools):
    toolchain.skip_if_compiled_for(committed(), source)
    compare(table.cuda_rows(source), f"cuda/{source.stem}")


@pytest.mark.parametrize("architecture", compiling.CUDA_ARCHITECTURES)
def test_the_table_of_triton_kernels_holds(architecture, tools):
    ops = [op for op in triton_launches.OPS if not table.is_current_triton(committed(), op)]
    rows = table.triton_rows(architecture, ops) if ops else []
    for op in ops:
        source = f"triton/{op}"
        compare([row for row in rows if row["source"] == source], source, architecture)
