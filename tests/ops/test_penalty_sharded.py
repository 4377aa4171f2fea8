"""Penalties of DTensors, on ranks of gloo groups: the sum over all shards, and its gradient."""

import pytest
import torch
from process_group import running_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from reg_kernels import functional as F

SHAPES = ((7, 5), (1,), (4, 3, 2), (0, 2))
PENALTIES = (F.l1_penalty, F.l2_penalty)


@pytest.fixture(scope="module")
def ranks():
    with running_ranks() as pool:
        yield pool


def tensors(dtype):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def placed(dtype):
    """The tensors in every placement there is, and one plain one among them; in lists."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    places = [(line, [Shard(0)]), (line, [Replicate()])]
    if size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        places += [
            (grid, [Replicate(), Shard(0)]),
            (grid["a"], [Shard(0)]),
            (grid["b"], [Shard(0)]),
        ]
    lists = [
        [distribute_tensor(x, mesh, at, src_data_rank=None) for x in tensors(dtype)]
        for mesh, at in places
    ]
    # All of them at once: each tensor in another place, and the first one in none.
    first, *others = tensors(dtype)
    mixed = [
        distribute_tensor(x, *places[i % len(places)], src_data_rank=None)
        for i, x in enumerate(others)
    ]
    return [*lists, [first, *mixed]]


def penalised(dtype, backend):
    found = []
    for of in placed(dtype):
        for penalty in PENALTIES:
            params = [nn.Parameter(x) for x in of]
            value = penalty(params, backend=backend)
            assert type(value) is torch.Tensor
            (3 * value).backward()
            grads = [p.grad for p in params]
            for p, grad in zip(params, grads, strict=True):
                if isinstance(p, DTensor):
                    assert grad.placements == p.placements
            whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
            found.append((value.detach(), whole))
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_sum_is_that_of_the_whole_tensors(ranks, size, backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        results = ranks(size, penalised, dtype, backend)
        for i, (value, grads) in enumerate(results[0]):
            params = [nn.Parameter(x) for x in tensors(dtype)]
            expected = PENALTIES[i % 2](params)
            (3 * expected).backward()
            torch.testing.assert_close(value, expected.detach(), rtol=2e-7, atol=0)
            for own, p in zip(grads, params, strict=True):
                assert torch.equal(own, p.grad)
            assert all(torch.equal(value, other[i][0]) for other in results)


def trained():
    """What decay="l2" does, and a penalty in the loss does as well, on a net of fully_shard."""
    from torch.distributed.fsdp import fully_shard

    from reg_kernels.optim import SGD

    found = []
    for penalty in (False, True):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
        optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.0 if penalty else 0.2)
        x = torch.linspace(-1, 1, 20).view(4, 5)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if penalty:
                (0.1 * F.l2_penalty(net.parameters())).backward()
            optimizer.step()
        found.append([p.full_tensor().detach() for p in net.parameters()])
    return found


def test_a_penalty_trains_as_decay_does(ranks):
    for decayed, penalised_ in ranks(2, trained):
        for x, y in zip(decayed, penalised_, strict=True):
            torch.testing.assert_close(x, y)


def refused():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    with pytest.raises(RuntimeError) as raised:
        F.l1_penalty([torch.ones(2), x])
    return str(raised.value)


def test_parts_are_refused(ranks):
    for message in ranks(2, refused):
        assert message.startswith(
            "l1_penalty: a DTensor must be placed as Shard or Replicate, got (Partial(sum),) "
            "for params[1]: call redistribute()"
        )
