"""Distillation on a GPU: against torch in float64, no waiting for the device, what the kernels
assert of labels, CUDA graphs, rows longer than shared memory, sizes past 2^31.

Skipped without a GPU; `make gpu-report` runs it. Tests with "short" in their name are those that it
runs under compute-sanitizer as well.
"""

from contextlib import nullcontext

import pytest
import torch
from loss_inputs import distillation_by_torch, results

from reg_kernels import functional as F
from reg_kernels._mixed_target import MixedTarget

from support import DTYPE_IDS, DTYPES, captured, check_device_assertion, implementations, no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton
layouts = pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])

# A thread, a warp and a block for a position; odd rows; planes.
SHAPES = [(1, 1), (300, 2), (65, 17), (9, 1000), (5, 1031), (4, 5001), (3, 5, 9, 7), (2, 40, 33)]
# One that shared memory holds for bfloat16 alone, and one that it never does.
LONG = [(3, 50_257), (2, 256_001)]


def draw(shape, dtype=torch.float64, last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).to(CUDA, dtype)


def labels_of(shape, ignored=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    positions = (shape[0], *shape[2:])
    labels = torch.randint(shape[1], positions, generator=generator)
    if ignored is not None:
        labels.view(-1)[1::3] = ignored
    return labels.to(CUDA)


def assert_close(ours, true, dtype):
    """Within some roundings of what is stored, and of float32 where that is computed in."""
    compute = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    for a, b in zip(ours, true, strict=True):
        assert a.dtype == dtype
        error = float((a.double() - b).abs().max())
        assert error <= (torch.finfo(dtype).eps + 64 * compute) * (float(b.abs().max()) + 1e-3)


# Values


def check(shape, last, dtype, backend, **options):
    """Against torch in float64, with another type for the teacher; then the same bits again."""
    x, teacher = draw(shape, dtype, last), draw(shape, torch.bfloat16, seed=2)
    target = labels_of(shape, -100)
    args = (x, teacher, target)
    ours = results(F.distillation_loss, *args, backend=backend, **options)
    truth = results(distillation_by_torch, x.double(), teacher, target, **options)
    assert_close(ours, truth, dtype)
    again = results(F.distillation_loss, *args, backend=backend, **options)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)
    return ours


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@layouts
@reductions
@dtypes
def test_short_is_torchs_twice_with_the_same_bits(dtype, reduction, last, shape, backend):
    check(shape, last, dtype, backend, reduction=reduction, temperature=1.5, ignore_index=-100)


@kernels
@pytest.mark.parametrize("shape", LONG, ids=str)
@reductions
@dtypes
def test_rows_that_shared_memory_does_not_hold(dtype, reduction, shape, backend):
    check(shape, False, dtype, backend, reduction=reduction, label_smoothing=0.1)


@kernels
@pytest.mark.parametrize("shape", [(9, 33), (5, 1031), (3, 5, 9, 7)], ids=str)
@reductions
def test_short_pairs_weights_and_smoothing(reduction, shape, backend):
    x, teacher = draw(shape), draw(shape, seed=2)
    pair = MixedTarget(labels_of(shape), labels_of(shape, seed=3), 0.3)
    weight = torch.linspace(0.5, 2, shape[1], device=CUDA, dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
    ours = results(F.distillation_loss, x, teacher, pair, backend=backend, **options)
    truth = results(distillation_by_torch, x, teacher, pair, **options)
    assert_close(ours, truth, torch.float64)


@kernels
@pytest.mark.parametrize("shape", [(3, 5, 3), (4, 40), (4, 2000)], ids=str)
@pytest.mark.parametrize("excluded", ["student", "teacher", "both", "all of a position"])
def test_short_infinite_and_large_logits(excluded, shape, backend):
    # Not the teacher's large: where a share of its vanishes and the student's logarithm is
    # infinite, the last bits decide whether the product is infinite or NaN.
    x, teacher, labels = 3000 * draw(shape), draw(shape, seed=2), labels_of(shape)
    if excluded == "all of a position":
        x[0] = -torch.inf
    else:
        some = draw(shape, seed=3) > 3
        for logits, names in ((x, "student both"), (teacher, "teacher both")):
            if excluded in names:
                logits[some] = -torch.inf
    args = (x, teacher, labels)
    ours = results(F.distillation_loss, *args, backend=backend, reduction="none")
    truth = results(distillation_by_torch, *args, reduction="none")
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True)


# The device


@kernels
@reductions
def test_waits_for_nothing(reduction, backend):
    cases = [
        (draw(shape), draw(shape, seed=2), labels_of(shape)) for shape in [(9, 1000), (2, 5, 9, 7)]
    ]
    for step in range(2):  # Triton compiles at the first
        with no_waiting() if step else nullcontext():
            for args in cases:
                results(F.distillation_loss, *args, backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", implementations("cuda")[:1])
@pytest.mark.parametrize("shape", [(4, 5), (4, 40), (4, 2000), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_asserts_labels(reduction, shape, backend):
    program = f"""
    import torch
    from reg_kernels import functional as F
    shape = {shape}
    x = torch.zeros(shape, device="cuda")
    labels = torch.full((shape[0], *shape[2:]), shape[1], device="cuda")
    try:
        F.distillation_loss(x, x, labels, reduction={reduction!r}, backend={backend!r})
        torch.cuda.synchronize()
    except RuntimeError as error:
        print("raised:", error)
    """
    check_device_assertion(program)


@kernels
@pytest.mark.parametrize("shape", [(300, 10), (40, 1000), (9, 20_000), (2, 5, 9, 7)], ids=str)
@reductions
def test_graph_capture_follows_what_is_on_the_device(reduction, shape, backend):
    x, teacher, labels = draw(shape), draw(shape, seed=2), labels_of(shape)

    def step():
        return results(
            F.distillation_loss, x, teacher, labels, backend=backend, reduction=reduction
        )

    replay, results_there = captured(step)
    for _ in range(3):
        x.mul_(-1.25)
        teacher.add_(x, alpha=0.5)
        labels.copy_(labels.roll(1, 0))
        replay()
        for a, b in zip(results_there, step(), strict=True):
            assert torch.equal(a, b)


@kernels
@pytest.mark.parametrize("classes", [2, 64, 65_536])
def test_more_than_2_to_the_31_elements(classes, backend):
    positions = 2**31 // classes + 3
    if torch.cuda.mem_get_info()[0] < 9 * positions * classes:
        pytest.skip("not enough free GPU memory")
    x = torch.zeros(positions, classes, dtype=torch.bfloat16, device=CUDA)
    x[-1, 0] = 4
    x.requires_grad_()
    teacher = torch.zeros(positions, classes, dtype=torch.bfloat16, device=CUDA)
    labels = torch.zeros(positions, dtype=torch.int64, device=CUDA)
    loss = F.distillation_loss(x, teacher, labels, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)
    for row in (0, -1):
        leaf = x[row : row + 1 or None].detach().double().requires_grad_()
        one = distillation_by_torch(leaf, torch.zeros_like(leaf), labels[:1], reduction="sum")
        (true,) = torch.autograd.grad(one, leaf)
        torch.testing.assert_close(gradient[row].double(), true[0], rtol=1e-2, atol=1e-6)
