"""Mixup and CutMix on a GPU: against the reference on the CPU, no waiting for the device, what the
kernels assert of values, CUDA graphs, sizes past 2^31.

Skipped without a GPU; `make gpu-report` runs it. Tests with "short" in their name are those that it
runs under compute-sanitizer as well.
"""

import pytest
import torch

from reg_kernels import backends
from reg_kernels import functional as F
from reg_kernels.ops.mixup import blend

from support import DTYPE_IDS, DTYPES, captured, check_device_assertion, implementations, no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton
layouts = pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])

# Samples smaller than a warp and longer than a block's tile; odd ones; many channels; a matrix.
SHAPES = [(6, 3, 5, 7), (5, 3, 64, 80), (70, 2, 3, 3), (4, 130, 9, 8), (3, 24, 31, 33), (9, 1001)]


def draw(shape, dtype=torch.float32, last=False, seed=0):
    """Values on the CPU, in either layout."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        x = torch.randint(256, shape, generator=generator, dtype=dtype)
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def shares(samples):
    return torch.tensor([0.3, 1.0, 0.7, 0.0, 0.45])[torch.arange(samples) % 5]


def permutation(samples):
    return torch.randperm(samples, generator=torch.Generator().manual_seed(samples))


def repeated(samples):
    return torch.arange(samples).square() % samples


def boxes_of(samples, height, width):
    kinds = [
        (0, 0, width, height),
        (0, 0, width // 2, 0),
        (width // 3, height // 4, width, height),
        (1, 0, 2, height),
    ]
    return torch.tensor(kinds)[torch.arange(samples) % 4]


def on_gpu(*arguments):
    """Tensors moved in the layout they have."""
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=CUDA).copy_(a)
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]


def assert_close(ours, true):
    """Within two roundings of the result's type and some of float32, of the largest value."""
    ours, true = ours.detach().cpu(), true.detach()
    assert ours.dtype == true.dtype
    assert ours.stride() == true.stride()
    eps = 2 * torch.finfo(ours.dtype).eps
    compute = 0 if ours.dtype == torch.float64 else 8 * 2.0**-23
    largest = max(1.0, float(true.double().abs().max()))
    assert float((ours.double() - true.double()).abs().max()) <= (eps + compute) * largest


@kernels
@layouts
@dtypes
@pytest.mark.parametrize("partners", [None, permutation, repeated])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_short_values_and_gradients_are_the_references(shape, partners, dtype, last, backend):
    last = last and len(shape) > 2
    samples = shape[0]
    index = partners and partners(samples)
    boxes = boxes_of(samples, *shape[-2:]) if len(shape) > 2 else None
    # Over all: some from another type, some into another layout.
    formats = [None] if len(shape) == 2 else [torch.contiguous_format, torch.channels_last]
    for source in (dtype, torch.uint8, torch.float32):
        for memory_format in formats:
            x = draw(shape, source, last)
            given = (x, shares(samples), boxes, index, torch.full((shape[1],), 0.4), 0.7)
            found = []
            for name, arguments in (("reference", given), (backend, on_gpu(*given))):
                leaf, *rest = arguments
                leaf = leaf.requires_grad_(source != torch.uint8)
                y = blend("mixup", leaf, *rest, dtype, memory_format, backend=name)
                found.append([y])
                if leaf.requires_grad:
                    g = draw(shape, dtype, last, seed=1).to(y.device)
                    found[-1].append(torch.autograd.grad(y, leaf, g)[0])
            for true, ours in zip(*found, strict=True):
                assert_close(ours, true)


@kernels
@layouts
@dtypes
@pytest.mark.parametrize("partners", [None, permutation])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_short_in_place_is_the_same(shape, partners, dtype, last, backend):
    last = last and len(shape) > 2
    samples = shape[0]
    x, lam, index, boxes = on_gpu(
        draw(shape, dtype, last),
        shares(samples),
        partners and partners(samples),
        boxes_of(samples, *shape[-2:]) if len(shape) > 2 else None,
    )
    expected = blend("mixup", x, lam, boxes, index, 0.4, 0.7, backend=backend)
    y = blend("mixup", x, lam, boxes, index, 0.4, 0.7, inplace=True, backend=backend)
    assert y is x
    assert_close(x, expected.cpu())


@kernels
@dtypes
@pytest.mark.parametrize("shift", [1, 3])
def test_short_misaligned_data(shift, dtype, backend):
    x = draw((5 * 1024 + shift,), dtype)
    expected = F.mixup(x[shift:].view(5, 1024), 0.3, backend="reference")
    batch = x.to(CUDA)[shift:].view(5, 1024)
    assert_close(F.mixup(batch, 0.3, backend=backend), expected)
    assert_close(F.mixup(batch, 0.3, inplace=True, backend=backend), expected)


@kernels
@layouts
def test_short_what_is_left_out_may_be_infinite(last, backend):
    x = draw((4, 3, 8, 8), last=last)
    x[1] = float("inf")
    x[2, :, 2:6] = float("nan")
    lam = torch.tensor([1.0, 0.0, 0.5, 1.0])
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 2, 8, 6], [0, 0, 8, 8]])
    index = torch.tensor([1, 0, 3, 0])
    expected = blend("mixup", x, lam, boxes, index, backend="reference")
    assert not torch.isnan(expected).any()
    y = blend("mixup", *on_gpu(x, lam, boxes, index), backend=backend)
    assert torch.equal(y.cpu(), expected)


@kernels
def test_nothing_waits_for_the_device(backend):
    x, lam, index, boxes = on_gpu(
        draw((8, 3, 16, 16), torch.uint8), shares(8), permutation(8), boxes_of(8, 16, 16)
    )
    options = {"mean": 0.4, "std": (0.2, 0.3, 0.4), "dtype": torch.float32, "backend": backend}

    def calls():
        y = F.mixup(x, lam, index, **options).requires_grad_()
        z = F.cutmix(y, boxes, index, memory_format=torch.channels_last, backend=backend)
        (gradient,) = torch.autograd.grad(z, y, z.detach())
        F.mixup(gradient, lam, index, inplace=True, backend=backend)
        return F.mixup(gradient, 0.3, inplace=True, backend=backend)

    expected = calls()  # the channels' constants are copied to the device the first time
    with no_waiting():
        found = calls()
    assert torch.equal(found, expected)


WRONG = {
    "index": "F.mixup(x, 0.3, torch.tensor([0, 1, 4, 2]).cuda(), backend=b)",
    "index below 0": "F.mixup(x, 0.3, torch.tensor([0, -1, 3, 2]).cuda(), backend=b)",
    "lam": "F.mixup(x, torch.tensor([0.0, 1.0, 0.5, 1.5]).cuda(), backend=b)",
    "lam NaN": "F.mixup(x, torch.tensor(float('nan')).cuda(), backend=b)",
    "box": "F.cutmix(x, torch.tensor([0, 0, 9, 2]).cuda(), backend=b)",
    "box inverted": "F.cutmix(x, torch.tensor([3, 0, 1, 2]).cuda(), backend=b)",
    "no permutation": (
        "F.mixup(x, 0.3, torch.tensor([0, 0, 2, 3]).cuda(), inplace=True, backend=b)"
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_values_are_asserted(call):
    program = f"""
        import torch
        from reg_kernels import functional as F
        x, b = torch.ones(4, 3, 8, 8, device="cuda"), "native"
        F.mixup(x, 0.3, backend=b)
        torch.cuda.synchronize()
        try:
            {call}
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("raised:", error)
    """
    check_device_assertion(program)


@kernels
def test_graph_capture_follows_what_is_on_the_device(backend):
    x, lam, index, boxes = on_gpu(
        draw((8, 3, 32, 32)), shares(8), permutation(8), boxes_of(8, 32, 32)
    )

    def step():
        leaf = x.detach().requires_grad_()
        y = blend("mixup", leaf, lam, boxes, index, backend=backend)
        (gradient,) = torch.autograd.grad(y, leaf, y.detach())
        return y.detach(), blend("mixup", gradient, lam, boxes, index, inplace=True)

    replay, results = captured(step)
    for _ in range(3):
        x.mul_(-1.25)
        lam.copy_(lam.roll(1))
        index.copy_(index.roll(1))
        boxes.copy_(boxes.roll(1, 0))
        replay()
        for a, b in zip(results, step(), strict=True):
            assert torch.equal(a, b)


@kernels
@pytest.mark.parametrize("shape", [(2**16 + 3, 3, 64, 171), (2, 3, 1, 2**30 + 8)], ids=str)
def test_more_than_2_to_the_31_elements(shape, backend):
    # Many samples, then such long ones. Results are compared at some samples and columns.
    if torch.cuda.mem_get_info()[0] < 7 * torch.Size(shape).numel():
        pytest.skip("not enough free GPU memory")
    samples, columns = shape[0], shape[-1]
    rows = torch.tensor([0, 1, samples // 2, samples - 2, samples - 1], device=CUDA)
    some = torch.arange(0, columns, max(1, columns // 1000), device=CUDA)
    x = torch.randint(256, shape, dtype=torch.uint8, device=CUDA)
    y = F.mixup(x, 0.25, mean=0.4, dtype=torch.bfloat16, backend=backend)

    def part(x, rows):
        return torch.stack([x[n].index_select(-1, some) for n in rows.tolist()]).cpu()

    both = torch.cat([part(x, rows), part(x, samples - 1 - rows).flip(0)])
    expected = F.mixup(both, 0.25, mean=0.4, dtype=torch.bfloat16, backend="reference")
    assert_close(part(y, rows), expected[: len(rows)])
    del x

    last = F.mixup(y, 0.0, memory_format=torch.channels_last, backend=backend)
    assert torch.equal(part(last, rows), part(y, samples - 1 - rows))
    expected = F.mixup(torch.cat([part(y, rows), part(last, rows).flip(0)]), 0.25)[: len(rows)]
    del last
    F.mixup(y, 0.25, inplace=True, backend=backend)
    assert_close(part(y, rows), expected)


def test_native_is_the_choice():
    assert backends.choose("mixup", "cuda", torch.float32) == "native"
