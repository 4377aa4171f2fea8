"""Optimizers on DTensors, on ranks of gloo groups: held to the same step of one process."""

from collections import Counter

import pytest
import torch
from process_group import running_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from reg_kernels.optim import SGD, SGDW, Adam, AdamW

BFLOAT = torch.bfloat16
# Uneven for every number of ranks, less than one row for each, and nothing at all.
SHAPES = ((7, 5), (6,), (4, 3), (1,), (5, 2, 3), (0, 4), (9, 11))
STEPS = 3


@pytest.fixture(scope="module")
def ranks():
    with running_ranks() as pool:
        yield pool


def values(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# How each optimizer is made; each has to give the same bits wherever its parameters lie.
RUNS = {
    "AdamW": (AdamW, torch.float32, {}),
    "AdamW, all of it": (
        *(AdamW, torch.float32),
        {"amsgrad": True, "l1": 0.02, "ema_decay": 0.9, "decay": "decoupled_lr"},
    ),
    "Adam": (Adam, torch.float64, {"weight_decay": 0.1}),
    "SGDW": (SGDW, torch.float32, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD": (SGD, torch.float16, {}),
    "kahan": (
        *(AdamW, BFLOAT),
        {"rounding": "kahan", "state_dtype": torch.float32, "ema_decay": 0.5},
    ),
    "stochastic": (AdamW, BFLOAT, {"rounding": "stochastic"}),
    "stochastic SGD": (SGD, BFLOAT, {"rounding": "stochastic", "momentum": 0.9}),
}


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def steps_of(run, place, **more):
    """Parameters and their state after some steps, whole; `place` puts a tensor where it is to be,
    number i of the list."""
    kind, dtype, options = RUNS[run]
    params = [nn.Parameter(place(i, values(shape, dtype, i))) for i, shape in enumerate(SHAPES)]
    optimizer = kind(params, lr=0.05, **options, **more)
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = place(i, values(SHAPES[i], dtype, 100 * step + i + 50))
        if step == 1:
            params[2].grad = None
        versions = [p._version for p in params]
        optimizer.step()
        moved = [p._version > v for p, v in zip(params, versions, strict=True)]
        assert moved == [p.grad is not None for p in params]
    for p in params:
        for name, value in optimizer.state[p].items():
            if name != "step" and isinstance(p, DTensor):
                assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
                assert value.shape == p.shape
    return {
        "params": [whole(p) for p in params],
        "state": [{k: whole(v) for k, v in optimizer.state[p].items()} for p in params],
        "norm": optimizer.grad_norm,
    }


def alone(run, **more):
    torch.manual_seed(3)
    return steps_of(run, lambda i, x: x, **more)


def layouts():
    """How tensors can be placed on so many ranks, by name."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))

    def over(mesh, *placements):
        def place(i, x):
            fitting = [
                p if not isinstance(p, Shard) or p.dim < x.dim() else Replicate()
                for p in placements
            ]
            return distribute_tensor(x, mesh, fitting, src_data_rank=None)

        return place

    found = {
        "rows": over(line, Shard(0)),
        "columns": over(line, Shard(1)),
        "replicas": over(line, Replicate()),
        "and plain tensors": lambda i, x: over(line, Shard(0))(i, x) if i % 2 else x,
    }
    if size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found["replicas of rows"] = over(grid, Replicate(), Shard(0))
        found["rows and columns"] = over(grid, Shard(0), Shard(1))
        of = (over(line, Shard(0)), over(grid["a"], Shard(0)), over(grid["b"], Shard(0)))
        found["several meshes"] = lambda i, x: of[i % 3](i, x)
    return found


def all_runs():
    # Only the first rank's seed counts, also for what is rounded by chance.
    found = {}
    for name, place in layouts().items():
        for run in RUNS:
            torch.manual_seed(3 if dist.get_rank() == 0 else 4)
            found[name, run] = steps_of(run, place)
    return found


@pytest.mark.parametrize("size", [4, 3, 2, 1])
def test_a_step_has_the_same_bits_however_its_tensors_are_sharded(ranks, size):
    results = ranks(size, all_runs)
    expected = {run: alone(run) for run in RUNS}
    for rank, found in enumerate(results):
        for (layout, run), result in found.items():
            where = f"{layout}, {run}, rank {rank}"
            for own, true in zip(result["params"], expected[run]["params"], strict=True):
                assert torch.equal(own, true), where
            for own, true in zip(result["state"], expected[run]["state"], strict=True):
                assert own.keys() == true.keys(), where
                assert all(torch.equal(own[key], true[key]) for key in own), (where, own, true)


def rounded_by_chance():
    """What is refused, and of tensors that are no rows of a contiguous one their bits."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    said = []
    for shape, placements in (
        ((2, 4, 6), [Shard(1), Shard(2)]),
        ((6, 3), [Shard(0), Shard(0)]),
    ):
        x = distribute_tensor(torch.ones(shape, dtype=BFLOAT), grid, placements)
        p = nn.Parameter(x)
        p.grad = torch.ones_like(p)
        try:
            AdamW([p], rounding="stochastic").step()
        except RuntimeError as error:
            said.append(str(error))

    def stepped(params, grads):
        torch.manual_seed(3)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        SGD(params, lr=0.1, rounding="stochastic").step()
        return [whole(p) for p in params]

    same = {}
    images = values((8, 4, 3, 2), BFLOAT, 0).contiguous(memory_format=torch.channels_last)
    slopes = values((8, 4, 3, 2), BFLOAT, 1).contiguous(memory_format=torch.channels_last)
    (expected,) = stepped([nn.Parameter(images.clone())], [slopes])
    for placements in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Shard(1)]):
        own, grad = (distribute_tensor(x, grid, placements) for x in (images, slopes))
        (found,) = stepped([nn.Parameter(own)], [grad])
        same["channels_last", str(placements)] = torch.equal(found, expected)

    # Tensor parallel layers whose shards are sharded again: the second one's are strided.
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).bfloat16()
    plain = [nn.Parameter(p.detach().clone()) for p in layers.parameters()]
    grads = [values(p.shape, BFLOAT, i) for i, p in enumerate(plain)]
    expected = stepped(plain, grads)
    parallelize_module(layers, grid["b"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    params = list(fully_shard(layers, mesh=grid["a"]).parameters())
    placed = [
        distribute_tensor(g, p.device_mesh, p.placements)
        for g, p in zip(grads, params, strict=True)
    ]
    for i, (own, true) in enumerate(zip(stepped(params, placed), expected, strict=True)):
        same["tensor parallel", str(params[i].placements)] = torch.equal(own, true)
    return said, same


def test_stochastic_rounding_of_other_shards(ranks):
    for said, same in ranks(4, rounded_by_chance):
        assert len(said) == 2
        assert all(
            "rounding='stochastic' must go with shards of one dimension, or of the first one and "
            "another, got placements (Shard" in message
            for message in said
        )
        assert all(same.values()), same


# The norm


def clipped_runs():
    found = {}
    for name, place in layouts().items():
        torch.manual_seed(3)
        found[name] = steps_of("AdamW", place, max_grad_norm=0.5)
    return found


@pytest.mark.parametrize("size", [4, 3, 2, 1])
def test_the_norm_is_that_of_all_shards_and_the_same_on_every_rank(ranks, size):
    expected = alone("AdamW", max_grad_norm=0.5)
    results = ranks(size, clipped_runs)
    for layout, result in results[0].items():
        # To the last bit but one, of sums that are taken in another order.
        torch.testing.assert_close(result["norm"], expected["norm"], rtol=2**-51, atol=0)
        for own, true in zip(result["params"], expected["params"], strict=True):
            torch.testing.assert_close(own, true, rtol=1e-6, atol=1e-7)
        for other in results:
            assert torch.equal(result["norm"], other[layout]["norm"]), layout
            for own, true in zip(result["params"], other[layout]["params"], strict=True):
                assert torch.equal(own, true), layout


def torchs_norm():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [
        nn.Parameter(distribute_tensor(values(s, torch.float32, 1), mesh, [Shard(0)]))
        for s in SHAPES
    ]
    optimizer = AdamW(params, max_grad_norm=1e9)
    for p in params:
        p.grad = distribute_tensor(values(p.shape, torch.float32, 2), mesh, [Shard(0)])
    optimizer.step()
    norm = nn.utils.clip_grad_norm_(params, 0.1).full_tensor()
    before = optimizer.grad_norm
    optimizer.step()  # of what torch has clipped
    return float(norm), float(before), float(optimizer.grad_norm)


def test_torchs_clipping_goes_with_it(ranks):
    for theirs, ours, clipped in ranks(2, torchs_norm):
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert clipped == pytest.approx(0.1, rel=1e-4)


def collectives_of(run):
    """What is sent in a step, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = [e.name for e in profile.events() if e.name.startswith("c10d::")]
    return dict(Counter(names))


def counted_steps():
    counts = {}
    kinds = {"plain": {}, "norm": {"max_grad_norm": 1.0}}
    kinds["stochastic"] = {"rounding": "stochastic"}
    place = layouts()
    for layout in sorted(place.keys() & {"rows", "several meshes"}):
        for name, options in kinds.items():
            dtype = BFLOAT if name == "stochastic" else torch.float32
            params = [
                nn.Parameter(place[layout](i, values(s, dtype, i))) for i, s in enumerate(SHAPES)
            ]
            optimizer = AdamW(params, **options)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            # A rank without gradients takes part in what the others do.
            if dist.get_rank() == 1:
                optimizer.zero_grad()
            counts[layout, name] = collectives_of(optimizer.step)
    return counts


def test_what_a_step_sends_is_one_all_reduce_for_the_norm(ranks):
    sent = {
        "plain": {},
        "norm": {"c10d::allreduce_": 1},
        "stochastic": {"c10d::broadcast_": 1},
    }
    for size in (1, 4):
        for found in ranks(size, counted_steps):
            for (layout, name), counts in found.items():
                assert counts == (sent[name] if size > 1 else {}), (size, layout, name)


# What moves between steps


def after_changes():
    """A parameter whose shard, gradient's shard or state's shard becomes another tensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(values((5, 3), torch.float32, 0), mesh, [Shard(0)]))
    q = nn.Parameter(values((5, 3), torch.float32, 0))
    optimizers = AdamW([p], lr=0.1), AdamW([q], lr=0.1)

    def step(seed):
        gradient = values((5, 3), torch.float32, seed)
        p.grad, q.grad = distribute_tensor(gradient, mesh, [Shard(0)]), gradient
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(p.full_tensor(), q), seed

    step(1)
    p._local_tensor = p._local_tensor.clone()
    step(2)
    state = optimizers[0].state[p]
    state["exp_avg"] = state["exp_avg"].clone()
    step(3)
    state["exp_avg_sq"]._local_tensor = state["exp_avg_sq"]._local_tensor.clone()
    step(4)
    state["step"] = state["step"].clone()
    step(5)
    assert p.to_local().grad is None
    return int(state["step"])


def test_a_shard_that_is_another_tensor_is_noticed(ranks):
    assert ranks(2, after_changes) == [5, 5]


def averaged():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)]))
    optimizer = AdamW([p], lr=0.1, ema_decay=0.5, max_grad_norm=1.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    own, average = p.full_tensor(), optimizer.state[p]["ema"].full_tensor()
    with optimizer.ema_weights():
        assert torch.equal(p.full_tensor(), average)
    assert torch.equal(p.full_tensor(), own)
    p.grad = None  # then its average alone goes on
    optimizer.step()
    return torch.equal(optimizer.state[p]["ema"].full_tensor(), average + 0.5 * (own - average))


def test_averages_are_swapped_in_and_out(ranks):
    assert ranks(3, averaged) == [True] * 3


# FSDP2


def net():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    )


def sharded_net(mesh=None):
    from torch.distributed.fsdp import fully_shard

    model = net()
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, steps=3, scaler=None, compiled=False):
    x = values((8, 6), torch.float32, 9)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step()
    return [whole(p) for p in model.parameters()]


def fsdp_runs(compiled):
    from reg_kernels.optim import param_groups

    found = {}
    meshes = {"one": init_device_mesh("cpu", (dist.get_world_size(),))}
    if dist.get_world_size() == 4:
        names = ("replicate", "shard")
        meshes["replicas"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    for name, mesh in meshes.items():
        model = sharded_net(mesh)
        said = []
        groups = param_groups(model, 0.1, report=said.append)
        optimizer = AdamW(groups, lr=0.05, max_grad_norm=0.1)
        found[name] = said, train(model, optimizer, compiled=compiled)
    return found


@pytest.mark.parametrize(("size", "compiled"), [(2, False), (4, False), (2, True)])
def test_fully_shard(ranks, size, compiled):
    from reg_kernels.optim import param_groups

    said = []
    model = net()
    groups = param_groups(model, 0.1, report=said.append)
    expected = train(model, AdamW(groups, lr=0.05, max_grad_norm=0.1))
    for found in ranks(size, fsdp_runs, compiled):
        for own_said, params in found.values():
            assert own_said == said
            for own, true in zip(params, expected, strict=True):
                torch.testing.assert_close(own, true, rtol=1e-5, atol=1e-6)


def scaled_steps(fused):
    model = sharded_net()
    optimizer = AdamW(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = values((8, 6), torch.float32, 9)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if step == 1 and dist.get_rank() == 1:
            model[0].weight.grad.to_local()[0, 0] = float("inf")
        before = [whole(p) for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        after = [whole(p) for p in model.parameters()]
        changed = any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
        found.append((changed, float(scaler.get_scale())))
    return found, int(optimizer.state[model[0].weight]["step"])


@pytest.mark.parametrize("fused", [False, True])
def test_an_infinity_on_one_rank_leaves_the_step_out_on_all(ranks, fused):
    expected = [(True, 8.0), (False, 4.0), (True, 4.0)], 2
    assert ranks(2, scaled_steps, fused) == [expected] * 2


# Saving and loading


def state_of(params, optimizer):
    return [{k: whole(v) for k, v in optimizer.state[p].items()} for p in params]


def loads_of_each_other():
    """A state_dict of whole tensors into a sharded optimizer and back, and of other placements."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def made(place):
        params = [nn.Parameter(place(values(s, torch.float32, 1))) for s in SHAPES]
        optimizer = AdamW(params, lr=0.05, ema_decay=0.9)
        return params, optimizer

    def stepped(place, params, optimizer):
        for p in params:
            p.grad = place(values(p.shape, torch.float32, 2))
        optimizer.step()

    def rows(x):
        return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)

    def replicas(x):
        return distribute_tensor(x, mesh, [Replicate()], src_data_rank=None)

    def same(x):
        return x

    places = (rows, replicas, same)
    for a in places:
        params, optimizer = made(a)
        stepped(a, params, optimizer)
        for b in places:
            others, other = made(b)
            other.load_state_dict(optimizer.state_dict())
            for x, y in zip(state_of(params, optimizer), state_of(others, other), strict=True):
                assert all(torch.equal(x[k], y[k]) for k in x), (a, b)
            stepped(b, others, other)  # the next plan takes what was loaded
    return True


def test_state_is_loaded_into_other_placements(ranks):
    assert ranks(2, loads_of_each_other) == [True] * 2


def zero_runs(path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=AdamW, lr=0.05, weight_decay=0.1, ema_decay=0.9
    )
    first = train(model, optimizer, 2)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), path)
    dist.barrier()
    weights, state = torch.load(path, weights_only=True)
    again = net()
    again.load_state_dict(weights)
    other = ZeroRedundancyOptimizer(
        again.parameters(), optimizer_class=AdamW, lr=0.05, weight_decay=0.1, ema_decay=0.9
    )
    other.load_state_dict(state)
    return first, train(model, optimizer, 1), train(again, other, 1)


def test_zero_redundancy_optimizer(ranks, tmp_path):
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1, ema_decay=0.9)
    expected = train(model, optimizer, 2), train(model, optimizer, 1)
    for first, last, resumed in ranks(2, zero_runs, str(tmp_path / "state")):
        for own, true in zip(first + last, expected[0] + expected[1], strict=True):
            assert torch.equal(own, true)
        for own, true in zip(resumed, last, strict=True):
            assert torch.equal(own, true)
    state = torch.load(tmp_path / "state", weights_only=True)[1]
    plain = torch.optim.AdamW(model.parameters(), lr=0.05)
    plain.load_state_dict(state)


# Bad input


def refusals():
    mesh = init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (1, 2))
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    found = {}

    def tried(name, run):
        try:
            run()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def rows(x, on=mesh):
        return distribute_tensor(x, on, [*[Replicate()] * (on.ndim - 1), Shard(0)])

    def partial(x):
        return DTensor.from_local(x, mesh, [Partial()], run_check=False)

    def step(grad, **options):
        p = nn.Parameter(rows(torch.ones(4, 3)))
        q = nn.Parameter(rows(torch.ones(2)))
        optimizer = AdamW([q, p], **options)
        q.grad, p.grad = torch.ones_like(q), grad
        before = whole(q)
        try:
            optimizer.step()
        finally:
            assert torch.equal(whole(q), before)
            assert not optimizer.state

    tried("partial", lambda: AdamW([rows(torch.ones(2)), partial(torch.ones(4))]))
    tried("partial gradient", lambda: step(partial(torch.ones(4, 3))))
    tried(
        "replicated gradient",
        lambda: step(
            torch.ones_like(rows(torch.ones(4, 3))).redistribute(placements=[Replicate()])
        ),
    )
    tried("another mesh", lambda: step(rows(torch.ones(4, 3), other)))
    tried("another mesh of more dimensions", lambda: step(rows(torch.ones(4, 3), grid)))

    def later():
        p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
        optimizer = AdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = partial(torch.ones(4, 3))  # a tensor that lies as the one before
        optimizer.step()

    tried("partial gradient later", later)

    def misplaced_state():
        p = nn.Parameter(rows(torch.ones(4, 3)))
        optimizer = AdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.state[p]["exp_avg"] = torch.zeros(4, 3)
        optimizer.step()

    tried("plain state", misplaced_state)

    def loaded():
        p = nn.Parameter(rows(torch.ones(4, 3)))
        q = nn.Parameter(rows(torch.ones(4, 3), other))
        optimizer = AdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        AdamW([q]).load_state_dict(optimizer.state_dict())

    tried("state of another mesh", loaded)

    if dist.get_rank() == 1:
        sub = dist.device_mesh.DeviceMesh("cpu", [0], _init_backend=False)
        x = DTensor.from_local(torch.ones(0), sub, [Shard(0)], run_check=False)
        tried("not this rank", lambda: SGD([x], lr=0.1))
    return found


def test_what_is_refused_says_which_and_what_to_do(ranks):
    first, second = ranks(2, refusals)
    starts = {
        "partial": "RuntimeError: AdamW: a DTensor must be placed as Shard or Replicate, got "
        "(Partial(sum),) for number 1 of its group: call redistribute()",
        "partial gradient": "RuntimeError: AdamW: a gradient must be placed as its parameter is, "
        "placements (Shard(dim=0),) on ranks [0, 1], got placements (Partial(sum),) on ranks "
        "[0, 1] for parameter 1 of group 0: p.grad = p.grad.redistribute(",
        "partial gradient later": "RuntimeError: AdamW: a gradient must be placed as",
        "replicated gradient": "RuntimeError: AdamW: a gradient must be placed as",
        "another mesh": "RuntimeError: AdamW: a gradient must be placed as",
        "another mesh of more dimensions": "RuntimeError: AdamW: a gradient must be placed as",
        "plain state": "RuntimeError: AdamW: exp_avg must be placed as its parameter is",
        "state of another mesh": "ValueError: AdamW: exp_avg must lie on its parameter's mesh",
    }
    for found in (first, second):
        for name, start in starts.items():
            assert found[name].startswith(start), (name, found[name])
    assert second["not this rank"].startswith(
        "RuntimeError: SGD: a DTensor's mesh must have this rank, 1, in it, got ranks [0] for"
    )


def _overlapping():
    meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [1, 2])]
    if dist.get_rank() != 1:
        return ""
    params = []
    for mesh in meshes:
        shard = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
        params.append(torch.nn.Parameter(shard))
        params[-1].grad = torch.zeros_like(shard)
    try:
        AdamW(params, max_grad_norm=1.0).step()
    except RuntimeError as error:
        return str(error)
    return "not refused"


def test_meshes_that_overlap_and_have_no_common_root_are_refused(ranks):
    assert ranks(3, _overlapping) == [
        "",
        "parameters must be on parts of one mesh where their meshes overlap, got meshes of ranks "
        "[0, 1] and [1, 2]: cut them from one init_device_mesh, or give each an optimizer of its "
        "own",
        "",
    ]
