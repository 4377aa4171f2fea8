"""The choice of implementation, forced and free."""

import gc
import os
import sys
import warnings

import pytest
import torch

import reg_kernels
import setup
from reg_kernels import backends
from reg_kernels import functional as F
from reg_kernels.ops._registry import OPS
from reg_kernels.ops._signature import Known

from support import run_program

NATIVE = backends.why_not("native", "cpu", torch.float32) is None


def python(code, **environment):
    environment = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return run_program([sys.executable, "-c", code], env=environment)


def overload(**arguments):
    return F.dropout(torch.ones(3, requires_grad=True), **arguments).grad_fn.call[0]


@pytest.mark.skipif(not NATIVE, reason="the native library was not built")
def test_each_instruction_set_of_this_machine_was_built():
    # Tests that compare them compare those that there are.
    from reg_kernels import _C

    names = next(list(isas) for isas in setup.ISA_FLAGS.values() if _C.isa() in isas)
    missing = set(names[: names.index(_C.isa())]) - set(_C.isas())
    if missing:
        pytest.skip(
            f"not built and so not tested: {', '.join(sorted(missing))}; `make build` adds them"
        )


def test_the_first_that_can_run_is_taken():
    expected = "default" if NATIVE else "triton"
    assert overload() is getattr(torch.ops.reg_kernels.dropout, expected)


def test_forcing_nests_and_is_undone():
    reference, native = torch.ops.reg_kernels.dropout.reference, overload()
    with reg_kernels.backend("reference"):
        assert overload() is reference
        if NATIVE:
            assert overload(backend="native") is torch.ops.reg_kernels.dropout.default
        with reg_kernels.backend(None):
            assert overload() is native
        with pytest.raises(KeyError), reg_kernels.backend("triton"):
            raise KeyError
        assert overload() is reference
    assert overload() is native


def test_unknown_names():
    expected = pytest.raises(ValueError, match="backend must be one of native, triton, reference")
    with expected, reg_kernels.backend("cuda"):
        pass
    call = "import torch, reg_kernels; reg_kernels.functional.dropout(torch.ones(3))"
    result = python(call, REG_KERNELS_BACKEND="fast")
    assert "ValueError: REG_KERNELS_BACKEND must be one of native" in result.stderr


def test_a_dtype_that_none_can_run():
    must = r"^dropout: dtype must be one of float64, float32, float16, bfloat16, got int32$"
    for device in ("cpu", "cuda", "xpu"):
        with pytest.raises(RuntimeError, match=must):
            backends.choose("dropout", device, torch.int32)


def test_the_environment_forces_one():
    result = python(
        "import torch, reg_kernels.functional as F\n"
        "print(F.dropout(torch.ones(3, requires_grad=True)).grad_fn.call[0])",
        REG_KERNELS_BACKEND="reference",
    )
    assert result.stdout.strip() == "reg_kernels.dropout.reference"


def test_a_forced_one_that_cannot_run_raises_with_reason_and_remedy():
    result = python(
        "import torch, reg_kernels\n"
        "try:\n"
        "    reg_kernels.functional.dropout(torch.ones(3), backend='triton')\n"
        "except reg_kernels.BackendUnavailable as error:\n"
        "    print(isinstance(error, RuntimeError), error)",
        TRITON_INTERPRET="0",
    )
    assert result.stdout.startswith("True dropout: backend 'triton' cannot run on cpu: triton ")
    assert "use native or reference" in result.stdout or not NATIVE
    assert len(result.stdout.splitlines()) == 1


def forget_what_can_run():
    for function in (
        backends._load_native,
        backends._load_cuda,
        backends._first_that_runs,
        backends._warn_of_slow_reference,
    ):
        function.cache_clear()
    for op in OPS.values():
        op._chosen.clear()
    for each in gc.get_objects():
        if type(each) is Known:
            each.clear()


def test_a_package_that_was_not_built_works_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(
        backends, "build_facts", lambda: {"native_missing": "not built", "cuda_missing": "no"}
    )
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)  # no triton
    forget_what_can_run()
    try:
        assert backends.why_not("native", "cpu", torch.float32) == "not built"
        with warnings.catch_warnings(action="error"):  # a build may leave them out
            assert backends.choose("dropout", "cpu", torch.float32) != "native"
            assert F.dropout(torch.ones(100), 0.5).unique().tolist() == [0.0, 2.0]
        with pytest.raises(reg_kernels.BackendUnavailable, match="not built"):
            F.dropout(torch.ones(3), backend="native")
    finally:
        monkeypatch.undo()
        forget_what_can_run()


def test_the_reference_that_nobody_asked_for_is_warned_of_once(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))  # no _build.json there
    monkeypatch.setattr(backends, "build_facts", backends.build_facts.__wrapped__)
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)  # no triton
    x = torch.ones(3)
    forget_what_can_run()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            F.dropout(x, backend="reference")
            with reg_kernels.backend("reference"):
                F.dropout(x)
            assert not [each for each in caught if each.category is not ResourceWarning]
            F.dropout(x)
            F.dropout(x.double())
            F.l2_penalty([x])
        # Whatever of earlier tests is collected meanwhile may warn of a file that was left open.
        caught = [each for each in caught if each.category is not ResourceWarning]
        assert [each.filename for each in caught] == [__file__]
        assert [str(each.message) for each in caught] == [
            f"reg_kernels, imported from {tmp_path}, runs its slow reference on the CPU: "
            "reg_kernels was not built: run `python setup.py build_ext --inplace` or install it"
        ]
    finally:
        monkeypatch.undo()
        forget_what_can_run()


def test_devices_without_kernels_of_their_own_run_the_reference():
    assert backends.choose("dropout", "mps", torch.float32) == "reference"
    assert "no native code for mps" in backends.why_not("native", "mps", torch.float32)
    assert "dtype int64 is none of" in backends.why_not("reference", "cpu", torch.int64)


def test_blocks_of_two_threads_may_overlap():
    """Whichever thread leaves its block first, what is left counts, and in the end nothing."""
    for first_out in (0, 1):
        blocks = [reg_kernels.backend("triton"), reg_kernels.backend("reference")]
        for block in blocks:
            block.__enter__()
        assert backends.forced_by() == "reference"
        blocks[first_out].__exit__(None, None, None)
        assert backends.forced_by() == ("reference", "triton")[first_out]
        blocks[1 - first_out].__exit__(None, None, None)
        assert backends.forced_by() is None
