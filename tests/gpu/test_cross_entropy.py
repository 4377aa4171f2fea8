"""Cross-entropy on a GPU: against torch in float64, no waiting for the device, what the kernels
assert of labels, CUDA graphs, rows longer than shared memory, sizes past 2^31.

Skipped without a GPU; `make gpu-report` runs it, and tests/ops on the GPU as well. Tests with
"short" in their name are those that it runs under compute-sanitizer.
"""

import math
from contextlib import nullcontext

import pytest
import torch

from reg_kernels import functional as F
from reg_kernels.cases.cross_entropy import LossCall
from reg_kernels.cases.dropout import _channels_last, _contiguous

from support import DTYPE_IDS, DTYPES, captured, check_device_assertion, implementations, no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
kinds = pytest.mark.parametrize("kind", ["labels", "shares", "probabilities"])

# Parts of a warp, a warp and a block for a row; odd rows; planes of odd length.
SHAPES = [(1, 1), (300, 2), (65, 17), (9, 1000), (5, 1031), (4, 5001), (3, 5, 9, 7), (2, 40, 33)]
# One that shared memory holds for 16 bits alone, and one that it never holds.
LONG = [(3, 50_257), (2, 256_001)]


def results(function, x, target, **options):
    """The loss of x, and its gradient for incoming ones that differ."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, target, **options)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=CUDA).add(0.3)
    return [y.detach(), *torch.autograd.grad(y, leaf, g.to(y.dtype).view(y.shape))]


# Values


def check(call, dtype, backend):
    """Against torch in float64, then the same bits again."""
    x = call.logits(CUDA, dtype)
    target, options = call.target(x), call.options(x)
    ours = results(F.cross_entropy, x, target, backend=backend, **options)
    wide = x.double()
    truth = results(call.cross_entropy, wide, call.target(wide))
    rounding = torch.finfo(dtype).eps + 64 * (2.0**-52 if dtype == torch.float64 else 2.0**-23)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).abs().max()) <= rounding * (float(b.abs().max()) + 1e-3)
    again = results(F.cross_entropy, x, target, backend=backend, **options)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [_contiguous, _channels_last])
@kinds
@dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_short_is_torch_in_float64_twice_with_the_same_bits(
    smoothing, dtype, kind, layout, shape, backend
):
    for reduction in ("none", "mean", "sum"):
        options = {"kind": kind, "label_smoothing": smoothing, "reduction": reduction}
        if kind != "probabilities":
            options["ignore_index"] = -100
        # The first class weighs nothing.
        check(LossCall(shape, layout, weighted=shape[1] > 1, **options), dtype, backend)


@kernels
@pytest.mark.parametrize("shape", LONG, ids=str)
@kinds
@dtypes
def test_rows_that_shared_memory_does_not_hold(dtype, kind, shape, backend):
    check(LossCall(shape, kind=kind, label_smoothing=0.1), dtype, backend)


@kernels
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_short_excluded_classes_and_large_logits(shape, backend):
    x = LossCall(shape).logits(CUDA, torch.float32)
    x[:, -1] = -math.inf
    x[0] = 1e4 * x[0].sign()
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=CUDA)
    ours = results(F.cross_entropy, x, labels, backend=backend, reduction="none")
    truth = results(torch.nn.functional.cross_entropy, x.double(), labels, reduction="none")
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_short_all_labels_ignored(shape, backend):
    x = LossCall(shape).logits(CUDA, torch.float32)
    labels = torch.full((shape[0], *shape[2:]), -100, device=CUDA)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = results(F.cross_entropy, x, labels, backend=backend, reduction=reduction)
        torch.testing.assert_close(float(loss), expected, equal_nan=True)
        assert not bool(grad.any())


# What does not wait for the device


@kernels
@kinds
@reductions
def test_does_not_wait_for_the_device(reduction, kind, backend):
    cases = []
    for shape in ((9, 1000), (4, 5001), (2, 5, 9, 7)):
        call = LossCall(shape, kind=kind, weighted=True, label_smoothing=0.1, reduction=reduction)
        x = call.logits(CUDA, torch.float32)
        cases.append((x, call.target(x), call.options(x)))
    for step in range(2):  # Triton compiles at the first
        with no_waiting() if step else nullcontext():
            for x, target, options in cases:
                results(F.cross_entropy, x, target, backend=backend, **options)


@pytest.mark.parametrize("backend", implementations("cuda")[:1])
@pytest.mark.parametrize("shape", [(4, 5), (4, 2000), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_asserts_labels(reduction, shape, backend):
    program = f"""
    import torch
    from reg_kernels import functional as F
    shape = {shape}
    x = torch.zeros(shape, device="cuda")
    labels = torch.full((shape[0], *shape[2:]), shape[1], device="cuda")
    try:
        F.cross_entropy(x, labels, reduction={reduction!r}, backend={backend!r})
        torch.cuda.synchronize()
    except RuntimeError as error:
        print("raised:", error)
    """
    check_device_assertion(program)


@kernels
@pytest.mark.parametrize("shape", [(5000, 10), (40, 1000), (9, 20_000), (2, 5, 9, 7)], ids=str)
@reductions
def test_graph_capture_follows_what_is_on_the_device(reduction, shape, backend):
    call = LossCall(shape, reduction=reduction)
    x = call.logits(CUDA, torch.float32)
    labels = call.target(x)

    def step():
        return results(F.cross_entropy, x, labels, backend=backend, reduction=reduction)

    replay, results_there = captured(step)
    for _ in range(3):
        x.mul_(-1.25)
        labels.copy_(labels.roll(1, 0))
        replay()
        for a, b in zip(results_there, step(), strict=True):
            assert torch.equal(a, b)


# rescale_


@dtypes
@pytest.mark.parametrize("factor", [1.0, -0.37])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("backend", implementations("cuda")[:1])
def test_short_rescale(backend, shift, factor, dtype):
    for size in (0, 1, 37, 20_001):
        x = torch.randn(size + shift, device=CUDA).to(dtype)[shift:]
        by = torch.tensor(factor, dtype=torch.float32, device=CUDA)
        expected = x * by
        with no_waiting():
            torch.ops.reg_kernels.rescale_(x, by)
        assert torch.equal(x, expected)


# Sizes


@kernels
@pytest.mark.parametrize("classes", [2, 64, 65_536])
def test_more_than_2_to_the_31_elements(classes, backend):
    positions = 2**31 // classes + 3
    if torch.cuda.mem_get_info()[0] < 5 * positions * classes:
        pytest.skip("not enough free GPU memory")
    x = torch.zeros(positions, classes, dtype=torch.bfloat16, device=CUDA)
    x[-1, 0] = 4
    x.requires_grad_()
    labels = torch.zeros(positions, dtype=torch.int64, device=CUDA)
    loss = F.cross_entropy(x, labels, reduction="none", backend=backend)
    others = classes - 1
    expected = torch.tensor([math.log(classes), math.log1p(others * math.exp(-4))])
    torch.testing.assert_close(loss[-2:].float().cpu(), expected, rtol=1e-2, atol=1e-2)
    del loss
    F.cross_entropy(x, labels, reduction="sum", backend=backend).backward()
    p = 1 / (1 + others * math.exp(-4))
    torch.testing.assert_close(float(x.grad[-1, 0]), p - 1, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(float(x.grad[-2, 0]), 1 / classes - 1, rtol=1e-2, atol=1e-2)
