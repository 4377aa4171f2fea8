"""Ops called as no public function would call them raise, and read or write nothing else."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reg_kernels.functional as F
from reg_kernels import backends
from reg_kernels.ops._registry import OPS

from hostile_inputs import VALID
from support import implementations, rng_state

PROGRAM = Path(__file__).parents[1] / "hostile_calls.py"
OP = torch.ops.reg_kernels
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")


def hostile_calls(*options):
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        ("native", 8000),
        ("reference", 1000),
        pytest.param("triton", 250, marks=CPU_ONLY),
    ],
)
def test_hostile_calls_raise_or_return(backend, calls):
    if (reason := backends.why_not(backend, "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    code, said = hostile_calls("--backend", backend, "--calls", calls)
    assert code == 0, said


def test_a_call_that_dies_is_named_and_the_others_run():
    code, said = hostile_calls("--backend", "reference", "--calls", 30, "--plant", 7)
    assert code == 1
    assert "reference --seed 0 --only 7 died: SIG" in said, said  # SEGV, or ABRT by sanitizers
    assert said.endswith("30 calls, 1 wrong\n"), said


def test_every_op_has_valid_calls_to_begin_with():
    parts = {"optimizer_step_table", "penalty_table", "penalty_backward_table"}
    assert set(VALID) == set(OPS) | parts


# What the right answer is where a call once died or was silently wrong.


@pytest.mark.parametrize("backend", implementations("cpu"))
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("activation", range(5))
def test_batch_norm_inference_of_nothing_has_gradients(backend, shape, activation):
    overload = OPS["batch_norm_inference"].overloads[backend]
    x = torch.empty(shape, requires_grad=True)
    w, b = (torch.ones(shape[1], requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = overload(x, w, b, None, mean, var, 1e-5, activation, 0.01)
    gradients = torch.autograd.grad(y.sum(), [x, w, b])
    assert y.shape == gradients[0].shape == x.shape
    assert all(torch.equal(g, torch.zeros(shape[1])) for g in gradients[1:])


@pytest.mark.parametrize("backend", implementations("cpu"))
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_counter_of_batches_wraps_around_as_torchs(backend, momentum):
    x = torch.randn(4, 3)
    batches = torch.tensor(2**63 - 1)
    F.batch_norm(
        *(x, torch.zeros(3), torch.ones(3)),
        training=True,
        momentum=momentum,
        num_batches_tracked=batches,
        backend=backend,
    )
    assert int(batches) == int(torch.tensor(2**63 - 1).add_(1)) == -(2**63)


@pytest.mark.parametrize("backend", implementations("cpu"))
def test_a_gate_that_a_hook_gives_back_otherwise_is_refused(backend):
    x = torch.randn(4, 3, 5, requires_grad=True)

    def unpack(t):
        return t[:1].expand(t.shape) if t.dtype == torch.uint8 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = F.batch_norm_act(x, None, None, training=True, drop=0.5, backend=backend)
    with pytest.raises(RuntimeError, match="batch_norm_backward: gate must be contiguous uint8"):
        y.sum().backward()


@pytest.mark.parametrize("backend", implementations("cpu"))
@pytest.mark.parametrize("loss", ["batch_norm_act", "cross_entropy", "probabilities", "teacher"])
def test_saved_tensors_in_another_order_give_the_same_gradient(backend, loss):
    """As torch.autograd.graph.save_on_cpu(pin_memory=True) brings them back: contiguous."""
    x = torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last).requires_grad_()
    r, other = torch.randn_like(x), torch.randn_like(x)
    labels = torch.randint(3, (4, 5, 2))

    def gradient(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            if loss == "batch_norm_act":
                y = F.batch_norm_act(
                    *(x, None, None, None, None, r, True), activation="silu", backend=backend
                )
                y = y * other  # not all alike, which has no gradient
            elif loss == "teacher":
                y = F.distillation_loss(x, r, labels, reduction="none", backend=backend)
            else:
                target = labels if loss == "cross_entropy" else r.softmax(1)
                y = F.cross_entropy(x, target, reduction="none", backend=backend)
        return torch.autograd.grad(y.sum(), x)[0]

    assert torch.equal(gradient(torch.Tensor.contiguous), gradient(lambda t: t))


@pytest.mark.parametrize("backend", implementations("cpu"))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(3).expand(4, 3)}, "input must be dense"),
        ({"input": torch.ones(4, dtype=torch.int64)}, "input must be one of float64"),
        ({"p": math.nan}, r"p must be in \[0, 1\], got nan"),
        ({"p": 2.0}, r"p must be in \[0, 1\], got 2"),
        ({"rng_state": torch.zeros(4, dtype=torch.int64)[::2]}, "rng_state must be contiguous"),
        ({"rng_state": torch.zeros(3, dtype=torch.int64)}, "rng_state must be contiguous int64 of"),
        ({"element_offset": 2**62}, r"element_offset must be in \[0, 2\^62\)"),
        ({"traced_p": torch.tensor(0.5)}, "traced_p must be a tensor of one element, of float64"),
    ],
    ids=str,
)
def test_dropout_in_place_refuses_and_leaves_its_input(backend, change, message):
    given = {"input": torch.ones(4), "p": 0.5, "rng_state": rng_state(), "element_offset": 0}
    given |= {"traced_p": None} | change
    before = given["input"].clone()
    with pytest.raises(RuntimeError, match=f"dropout_: {message}"):
        OPS["dropout_"].overloads[backend](*given.values())
    assert torch.equal(given["input"], before)


@pytest.mark.parametrize("backend", implementations("cpu"))
def test_memory_that_was_freed_is_refused(backend):
    x = torch.ones(8)[2:]
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="dropout: input must be a tensor whose memory was not"):
        OPS["dropout"].overloads[backend](x, 0.5, rng_state())
    with pytest.raises(RuntimeError, match=r"penalty: tensors\[0\] must be a tensor whose memory"):
        OPS["penalty"].overloads[backend]([x], 2)
    # torch takes its tensors of zeros that have no memory: the dispatcher makes real ones of them.
    zero = torch._efficientzerotensor(6)
    assert float(OPS["penalty"].overloads[backend]([zero], 2)) == 0
    y = OPS["dropout"].overloads[backend](zero, 0.5, rng_state())
    assert torch.equal(y, torch.zeros(6))


@pytest.mark.parametrize("backend", implementations("cpu"))
def test_mixup_in_place_refuses_an_index_in_its_own_memory(backend):
    x = torch.zeros(4, 4, dtype=torch.float64)
    index = x.view(torch.int64)[0]
    with pytest.raises(RuntimeError, match="mixup_: index must be apart in memory"):
        OPS["mixup_"].overloads[backend](x, None, 0.5, index, None, None, None)


def step_arguments(**changes):
    """Of optimizer_step_: Adam on two parameters, with what is changed."""
    ones = lambda: [torch.ones(4, 3), torch.ones(5)]  # noqa: E731
    lists = ("params", "grads", "steps", "first_moments", "second_moments")
    given = {"algorithm": 0} | {name: ones() for name in lists}
    given["steps"] = [torch.zeros(()), torch.zeros(())]
    given |= dict.fromkeys(("max_second_moments", "emas", "compensations"), ())
    given |= {"groups": [0, 0], "element_offsets": [0, 0]}
    given |= {"runs": [], "run_strides": []}
    given |= {"numbers": [0.1, 0.1, 0.0, 0.0, 0.9, 0.99, 1e-8, 0.0], "flags": [0], "rates": ()}
    given |= {"rounding": 0, "squares": None, "max_norm": 0.0}
    given |= dict.fromkeys(("grad_scale", "found_inf", "rng_state"))
    for name, value in changes.items():
        given[name] = value(given[name]) if callable(value) else value
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}


def first_of(change):
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


@pytest.mark.parametrize("backend", implementations("cpu"))
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("algorithm", 3, "algorithm must be 0, 1 or 2, got 3"),
        ("algorithm", 2, "emas must be 2 tensors"),
        ("algorithm", 2**40, "algorithm must be 0, 1 or 2"),
        ("first_moments", (), "first_moments must be 2 tensors, one for each parameter, got 0"),
        ("second_moments", (), "second_moments must be 2 tensors"),
        ("max_second_moments", [torch.ones(4, 3).double(), torch.ones(5).double()],
         r"max_second_moments\[0\] must be dense float32"),
        ("params", first_of(lambda x: torch.ones(3).expand(4, 3)), r"params\[0\] must be dense"),
        ("grads", first_of(lambda x: torch.ones(3).expand(4, 3)), r"grads\[0\] must be dense"),
        ("grads", first_of(lambda x: torch.ones(4, 6)[:, ::2]), r"grads\[0\] must be dense"),
        ("grads", first_of(lambda x: torch.ones(3, 4).t()), r"grads\[0\] must be dense float32"),
        ("first_moments", first_of(lambda x: torch.ones(()).expand(4, 3)), r"first_moments\[0\]"),
        ("steps", [torch.zeros(2), torch.zeros(())], r"steps\[0\] must be a tensor of one element"),
        ("groups", [0, 1], "groups must be 2 numbers below 1"),
        ("element_offsets", [0, -1], "element_offsets must be 2 numbers in"),
        ("runs", [3, 3], "run_strides must be 2 numbers in"),
        ("run_strides", [3, 3], "runs must be 2 numbers in"),
        ("flags", [3], "flags must be a decay"),
        ("rounding", 3, "rounding must be 0, 1 or 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_step_refuses_and_changes_nothing(backend, name, change, message):
    given = step_arguments(**{name: change})
    with pytest.raises(RuntimeError, match=f"optimizer_step_: {message}"):
        OPS["optimizer_step_"].overloads[backend](*given.values())
    for kept in ("params", "steps"):
        assert all(
            torch.equal(x, y) or kept == name
            for x, y in zip(given[kept], step_arguments()[kept], strict=True)
        )
