"""Dropout on a GPU: masks bit for bit the CPU's, CUDA graphs, sizes past 2^31.

Skipped without a GPU; `make gpu-report` runs it. Tests with "short" in their name are those that it
runs under compute-sanitizer as well.
"""

import pytest
import torch

from reg_kernels import backends, nn
from reg_kernels import functional as F
from reg_kernels.cases.dropout import P

from support import DTYPE_IDS, DTYPES, captured, implementations, no_waiting, rng_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton


@kernels
@dtypes
def test_short_edges(backend, dtype):
    # Every path once: whole blocks, odd ends, misaligned data, a start inside a group, in place.
    for size, offset in ((1, 0), (7, 3), (8192, 0), (20_001, 5), (33_000, 8)):
        x = torch.randn(size + 1).to(dtype)[1:]
        expected = F.dropout(x, P, rng_state=rng_state(), element_offset=offset)
        for data in (x.to(CUDA), torch.cat([x[:1], x]).to(CUDA)[1:]):
            y = F.dropout(data, P, rng_state=rng_state(), element_offset=offset, backend=backend)
            assert torch.equal(y.cpu(), expected)
            F.dropout(
                data, P, True, True, rng_state=rng_state(), element_offset=offset, backend=backend
            )
            assert torch.equal(data.cpu(), expected)


@kernels
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 16, 8, 8), (4, 13, 1, 1)])
def test_short_channels(backend, shape):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(shape).to(memory_format=layout)
        y = F.dropout2d(x.to(CUDA), P, rng_state=rng_state(), backend=backend)
        assert torch.equal(y.cpu(), F.dropout2d(x, P, rng_state=rng_state()))


@kernels
def test_short_state_and_probability_on_the_device(backend):
    x = torch.randn(5000)
    overload = torch.ops.reg_kernels.dropout
    overload = overload.default if backend == "native" else overload.triton
    for p in (0.0, 2**-17, 0.3, 1 - 2**-17, 1.0):
        traced = torch.tensor(p, dtype=torch.float64, device=CUDA)
        y = overload(x.to(CUDA), 0.0, rng_state().to(CUDA), 0, traced)
        expected = torch.ops.reg_kernels.dropout.reference(x, p, rng_state())
        assert torch.equal(y.cpu(), expected)


@kernels
def test_graph_capture_draws_a_fresh_mask_at_each_replay(backend):
    x = torch.ones(100_000, device=CUDA, requires_grad=True)
    layer = nn.Dropout(0.5, backend=backend)

    def step():
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), gradient

    replay, (y, gradient) = captured(step)
    masks = []
    for _ in range(3):
        replay()
        assert torch.equal(y, gradient)  # forward and backward share the replay's mask
        assert abs(float((y != 0).float().mean()) - 0.5) < 0.01
        masks.append(y.clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_manual_seed_rules_and_eager_calls_do_not_synchronise():
    x = torch.ones(1000, device=CUDA)
    torch.manual_seed(5)
    a, b = F.dropout(x), F.dropout(x)
    torch.manual_seed(5)
    with no_waiting():
        c = F.dropout(x)
    assert torch.equal(c, a)
    assert not torch.equal(a, b)


@kernels
def test_more_than_2_to_the_31_elements(backend):
    size = 2**31 + 7
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip("not enough free GPU memory")
    x = torch.ones(size, dtype=torch.bfloat16, device=CUDA)
    F.dropout(x, 0.5, inplace=True, rng_state=rng_state(), backend=backend)
    for first in (0, 2**31 - 50_000, size - 100_000):
        part = torch.ones(min(100_000, size - first), dtype=torch.bfloat16)
        expected = F.dropout(part, 0.5, rng_state=rng_state(), element_offset=first)
        assert torch.equal(x[first : first + part.numel()].cpu(), expected)
    channels = x.fill_(1)[: size - size % 21].view(3, 7, -1)
    y = F.dropout1d(channels, 0.5, rng_state=rng_state(), backend=backend)
    expected = F.dropout1d(torch.ones(3, 7, 1), 0.5, rng_state=rng_state()).squeeze(-1)
    assert torch.equal(y[..., 0].float().cpu(), expected)
    assert torch.equal(y[..., -1].float().cpu(), expected)


@kernels
def test_compiled_reduce_overhead_trains(backend):
    layer = nn.Dropout(0.5, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.ones(10_000, device=CUDA, requires_grad=True)
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y.detach())


def test_native_is_the_choice():
    assert backends.choose("dropout", "cuda", torch.float32) == "native"
