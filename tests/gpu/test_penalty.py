"""Penalties on a GPU: against the reference, the same bits twice, graphs, sizes past 2^31.

Skipped without a GPU; `make gpu-report` runs it, and tests/ops on the GPU as well. Tests with
"short" in their name are those that it runs under compute-sanitizer.
"""

import pytest
import torch

from reg_kernels import functional as F
from reg_kernels._tensor_table import TensorTable, addresses
from reg_kernels.ops.penalty import sum_into

from support import DTYPE_IDS, DTYPES, captured, implementations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton
powers = pytest.mark.parametrize("power", [1, 2])

SHORT = (0, 1, 7, 1001, 8192, 8193, 20_001)


def penalty(tensors, power, backend):
    return (F.l1_penalty if power == 1 else F.l2_penalty)(tensors, backend=backend)


def draw(sizes, dtype, shift=0):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n + shift, generator=generator).to(dtype).to(CUDA)[shift:].requires_grad_()
        for n in sizes
    ]


@kernels
@powers
@dtypes
@pytest.mark.parametrize("shift", [0, 1])
def test_short_is_the_reference_twice_with_the_same_bits(shift, dtype, power, backend):
    tensors = draw(SHORT, dtype, shift)
    found = []
    for name in (backend, backend, "reference"):
        total = penalty(tensors, power, name)
        found.append([total.detach(), *torch.autograd.grad(1.5 * total, tensors)])
    for x, y, truth in zip(*found, strict=True):
        assert torch.equal(x, y)
        # Sums in another order, of float64.
        rtol = max(2 * torch.finfo(x.dtype).eps, 1e-13)
        torch.testing.assert_close(x, truth, rtol=rtol, atol=0)


@kernels
@powers
def test_short_no_elements_and_many_tensors(power, backend):
    assert float(penalty([torch.empty(0, device=CUDA)] * 2, power, backend)) == 0
    ones = [torch.full((3,), 2.0, device=CUDA) for _ in range(3000)]
    assert float(penalty(ones, power, backend)) == 3000 * 3 * 2**power


@kernels
@powers
def test_nan_and_infinity_arrive(power, backend):
    x = torch.ones(50_000, device=CUDA)
    x[-1] = float("inf")
    assert float(penalty([x], power, backend)) == float("inf")
    x[20_000] = float("nan")
    assert torch.isnan(penalty([x], power, backend))


@kernels
def test_graph_capture_of_a_sum(backend):
    tensors = [x.detach() for x in draw(SHORT, torch.float32)]
    table = TensorTable(
        [x.numel() for x in tensors], CUDA, (tensors[0].dtype,), grad=addresses(tensors)
    )
    sums = torch.empty(2, dtype=torch.float64, device=CUDA)
    replay, _ = captured(lambda: sum_into(table, tensors, 2, sums, 1, backend))
    for _ in range(3):
        for x in tensors:
            x.mul_(-1.25)
        sums.fill_(-1)
        replay()
        expected = sum(x.double().square().sum() for x in tensors)
        torch.testing.assert_close(sums[1], expected, rtol=1e-13, atol=0)
        assert float(sums[0]) == -1
        assert float(table.scratch[0]) == 0


@kernels
def test_more_than_2_to_the_31_elements(backend):
    size = 2**31 + 20_001
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("not enough free GPU memory")
    x = torch.full((size,), -2.0, dtype=torch.bfloat16, device=CUDA).requires_grad_()
    # In float64, since float32 does not hold the count.
    total = penalty([x, torch.zeros((), dtype=torch.float64, device=CUDA)], 1, backend)
    assert float(total.detach()) == 2 * size
    (grad,) = torch.autograd.grad(total, x)
    assert bool((grad == -1).all())
