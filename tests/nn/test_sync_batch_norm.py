"""SyncBatchNorm on real ranks: BatchNorm over the whole batch, whoever has which part of it."""

import copy
import itertools
import pickle
from collections.abc import Iterator

import numpy
import pytest
import torch
from process_group import Ranks, running_ranks
from torch import distributed as dist
from torch import nn as torch_nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import reg_kernels
from reg_kernels import functional as F
from reg_kernels import nn

FLOAT, DOUBLE, BFLOAT, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAST = torch.channels_last


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


def part_of(x, sizes, rank):
    return x.split(sizes)[rank]


# Values and gradients: of several ranks, against torch's BatchNorm over the whole batch

# (shape of a sample, dtype, layout, (mean, deviation), options of the layer)
LAYERS = [
    ((6,), FLOAT, None, (0.5, 2.0), {}),
    ((5, 7), FLOAT, None, (0.5, 2.0), {"momentum": None}),
    ((6, 5, 4), FLOAT, None, (0.5, 2.0), {"momentum": 1.0}),
    ((6, 5, 4), DOUBLE, LAST, (0.5, 2.0), {"eps": 1e-3}),
    ((16, 23, 19), FLOAT, LAST, (0.5, 2.0), {}),
    ((3, 300, 2), FLOAT, None, (-3.0, 2.0), {"affine": False}),
    ((4, 2, 3, 3), FLOAT, None, (0.5, 2.0), {"track_running_stats": False}),
    ((6, 5, 4), FLOAT, None, (1e4, 1e-2), {"momentum": 1.0}),
    ((6, 5, 4), DOUBLE, LAST, (1e4, 1e-2), {"momentum": 1.0}),
    ((6, 5, 4), BFLOAT, None, (0.5, 2.0), {}),
    ((6, 5, 4), HALF, LAST, (0.5, 2.0), {}),
]
# How many samples each rank has.
BATCHES = [[5, 4], [1, 8], [4, 3, 2], [5, 0, 4], [0, 9, 0]]


def batch_of(layer, samples):
    """(input, gradient of the output, weight, bias) of a whole batch."""
    shape, dtype, layout, (mean, deviation), _ = layer
    generator = torch.Generator().manual_seed(len(shape) + shape[0])

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=DOUBLE)

    x = (draw(samples, *shape) * deviation + mean).to(dtype)
    g = draw(samples, *shape).to(dtype)
    if layout is not None:
        x, g = x.to(memory_format=layout), g.to(memory_format=layout)
    return x, g, draw(shape[0]) + 1, draw(shape[0])


def trained(norm, x, g, weight, bias, steps=2):
    """Output, gradients and buffers of a layer after some steps."""
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
    for _ in range(steps):
        norm.zero_grad()
        leaf = x.detach().requires_grad_()
        y = norm(leaf)
        y.backward(g)
    own = [p.grad for p in norm.parameters()]
    buffers = [b for b in norm.buffers() if b is not None]
    assert y.dtype == leaf.grad.dtype == x.dtype and y.stride() == leaf.grad.stride()
    return [y.detach(), leaf.grad, own, buffers]


def _layers(sizes):
    results = []
    for layer in LAYERS:
        x, g, weight, bias = batch_of(layer, sum(sizes))
        parameters = DOUBLE if layer[1] == DOUBLE else FLOAT
        norm = nn.SyncBatchNorm(layer[0][0], **layer[4], dtype=parameters)
        mine = [part_of(t, sizes, dist.get_rank()) for t in (x, g)]
        results.append(trained(norm, *mine, weight, bias))
    return results


def of_torch(layer, samples):
    x, g, weight, bias = batch_of(layer, samples)
    kind = {1: "1d", 2: "1d", 3: "2d", 4: "3d"}[len(layer[0])]
    parameters = DOUBLE if layer[1] == DOUBLE else FLOAT
    norm = getattr(torch_nn, f"BatchNorm{kind}")(layer[0][0], **layer[4], dtype=parameters)
    return flat(trained(norm, x, g, weight, bias))


def flat(results):
    return [*results[:2], *results[2], *results[3]]


def exact(layer, samples):
    """The same in 80 bits, rounded to float64."""
    _, dtype, _, _, options = layer
    x, g = (t.double() for t in batch_of(layer, samples)[:2])
    parameters = DOUBLE if dtype == DOUBLE else FLOAT
    affine = [t.to(parameters).double() for t in batch_of(layer, samples)[2:]]

    def wide(t):
        return numpy.moveaxis(t.numpy(), 1, -1).astype(numpy.longdouble)

    x, g, weight, bias = wide(x), wide(g), *(a.numpy().astype(numpy.longdouble) for a in affine)
    if not options.get("affine", True):
        weight, bias = 1, 0
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean = x.mean(axes)
    variance = ((x - mean) ** 2).mean(axes)
    scale = 1 / numpy.sqrt(variance + options.get("eps", 1e-5))
    normal = (x - mean) * scale
    of_bias, of_weight = g.sum(axes), (g * normal).sum(axes)
    gradient = weight * scale * (g - of_bias / count - normal * (of_weight / count))
    results = [numpy.moveaxis(t, -1, 1) for t in (normal * weight + bias, gradient)]
    if options.get("affine", True):
        results += [of_weight, of_bias]
    if options.get("track_running_stats", True):
        momentum = options.get("momentum", 0.1)
        start = 0 if momentum is None else (1 - momentum) ** 2
        moved = variance * count / (count - 1)
        results += [mean * (1 - start), moved * (1 - start) + start, numpy.array(2)]
    return [torch.from_numpy(t.astype(numpy.float64)) for t in results]


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
def test_it_is_batch_norm_of_the_whole_batch(ranks, sizes):
    """Outputs, gradients and statistics are within twice the error of torch's BatchNorm of the same
    dtype on the whole batch, and the statistics the same bits on all ranks."""
    of_ranks = ranks(len(sizes), _layers, sizes)
    for layer, results in zip(LAYERS, zip(*of_ranks, strict=True), strict=True):
        for other in results[1:]:
            assert all(map(torch.equal, other[3], results[0][3]))
        ours = [torch.cat([r[i] for r in results]) for i in (0, 1)]
        ours += [sum(gradients) for gradients in zip(*(r[2] for r in results), strict=True)]
        ours += results[0][3]
        compared = (ours, of_torch(layer, sum(sizes)), exact(layer, sum(sizes)))
        for own, torchs, true in zip(*compared, strict=True):
            unit = torch.finfo(own.dtype).eps if own.is_floating_point() else 0.0
            error, allowed = ((t.double() - true).abs().max() for t in (own, torchs))
            assert error <= 2 * allowed + unit * true.abs().max(), (layer, error, allowed)


def _loss(norm, x, residual, g):
    """This rank's loss, and all ranks'."""
    y = norm(x) if residual is None else norm(x, residual)
    loss = (y * g).sum()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return loss, total


def _finite_differences():
    """The gradients of all ranks' loss, by each rank's input, and what differences say of it."""
    rank, h, worst = dist.get_rank(), 1e-5, []
    for make, residuals in (
        (nn.SyncBatchNorm, False),
        (lambda c, **o: nn.SyncBatchNormAct(c, activation="silu", **o), True),
    ):
        torch.manual_seed(3)
        norm = make(2, dtype=DOUBLE)
        with torch.no_grad():
            norm.weight.add_(torch.randn(2))
        drawn = [torch.randn(5, 2, 2, dtype=DOUBLE).split([3, 2])[rank] for _ in range(3)]
        x, g = drawn[0].clone().requires_grad_(), drawn[1]
        residual = drawn[2].clone().requires_grad_() if residuals else None
        _loss(norm, x, residual, g)[0].backward()
        leaves = [(x, x.grad)] + ([(residual, residual.grad)] if residuals else [])
        for leaf, gradient in leaves:
            # Element i of rank 0, then of rank 1: all take part in each, and one of them moves.
            for mover, i in itertools.product(range(2), range(12)):
                if i >= (12, 8)[mover]:
                    continue
                values = []
                for step in (h, -h):
                    moved = leaf.detach().clone()
                    if mover == rank:
                        moved.view(-1)[i] += step
                    with torch.no_grad():
                        pair = (moved, residual) if leaf is x else (x, moved)
                        values.append(_loss(norm, *pair, g)[1])
                difference = (values[0] - values[1]) / (2 * h)
                if mover == rank:
                    worst.append(float((difference - gradient.view(-1)[i]).abs()))
    return max(worst)


def test_gradients_are_those_of_the_sum_of_all_ranks_losses(ranks):
    assert max(ranks(2, _finite_differences)) < 1e-8


def _dtypes_differ():
    rank = dist.get_rank()
    x = torch.arange(24.0).view(4, 2, 3).split(2)[rank].to([FLOAT, BFLOAT][rank])
    norm = nn.SyncBatchNorm(2, momentum=1.0)
    y = norm(x.requires_grad_())
    y.sum().backward()
    return y.dtype, norm.running_mean, norm.running_var


def test_ranks_may_compute_in_different_dtypes(ranks):
    """What is exchanged is float64 whatever they compute in."""
    results = ranks(2, _dtypes_differ)
    x = torch.arange(24.0).view(4, 2, 3)
    norm = torch_nn.BatchNorm1d(2, momentum=1.0)
    norm(x)
    assert [r[0] for r in results] == [FLOAT, BFLOAT]
    for _, mean, var in results:
        torch.testing.assert_close((mean, var), (norm.running_mean, norm.running_var))


def _one_value_in_all():
    norm = nn.SyncBatchNorm(2)
    counts = []
    for sizes in ([1, 0], [0, 0]):
        x = torch.ones(sizes[dist.get_rank()], 2, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        counts.append((y.detach(), x.grad))
    return counts, norm.running_mean, norm.running_var, int(norm.num_batches_tracked)


def test_a_single_value_in_all_moves_no_running_statistics(ranks):
    """It has no unbiased variance; and no rank may ask the others whether there are more."""
    for counts, mean, var, batches in ranks(2, _one_value_in_all):
        assert torch.equal(mean, torch.zeros(2)) and torch.equal(var, torch.ones(2))
        assert batches == 2
        assert all(torch.equal(t, torch.zeros_like(t)) for pair in counts for t in pair)


# What is exchanged


def _collectives():
    def counted(call):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        return sorted(e.name for e in profiled.events() if e.name.startswith("gloo:"))

    norm = nn.SyncBatchNormAct(3, drop=0.1)
    x = torch.randn(4, 3, 5, requires_grad=True)
    norm(x).sum().backward()  # the ranks agree on the channels
    outputs = []
    found = [
        counted(lambda: outputs.append(norm(x))),
        counted(lambda: outputs[0].sum().backward()),
        counted(lambda: outputs.append(norm(x.detach()))),
        counted(lambda: outputs[1].sum().backward()),
    ]
    norm.eval()
    return [*found, counted(lambda: norm(x).sum().backward())]


def test_one_exchange_forward_one_backward_and_none_in_evaluation(ranks):
    """Without a gradient of the input there is none backward either."""
    for found in ranks(2, _collectives):
        assert [len(names) for names in found] == [1, 1, 1, 0, 0]
        assert "all_gather" in found[0][0].replace("allgather", "all_gather")
        assert "all_reduce" in found[1][0].replace("allreduce", "all_reduce")


def _compiled(dynamic):
    """Of layers whose groups differ, each eager and compiled: outputs, gradients, buffers."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 32
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([r]) for r in range(size)][rank]
    pair = dist.new_group([0, 1])
    results = []
    for group in (None, pair if rank < 2 else alone, alone):
        eager, compiled = (nn.SyncBatchNormAct(3, process_group=group) for _ in range(2))
        calls = (
            (eager, eager),
            (torch.compile(compiled, fullgraph=True, dynamic=dynamic), compiled),
        )
        pairs = []
        for call, layer in calls:
            found = []
            for samples in (4, 3 + rank, 2):
                torch.manual_seed(samples)
                x = torch.randn(samples, 3, 5, 2, requires_grad=True)
                y = call(x)
                y.sin().sum().backward()
                found += [y.detach(), x.grad]
            pairs.append([*found, layer.weight.grad, *layer.buffers()])
        results.append(pairs)
    return results


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_in_one_graph_it_is_the_eager_one(ranks, dynamic):
    """Groups differ, also from those of the same names that the processes had before."""
    for size in (2, 3):
        for of_rank in ranks(size, _compiled, dynamic):
            for eager, compiled in of_rank:
                assert all(map(torch.equal, eager, compiled))


_KEPT = {}  # by a rank's process, from one group to the next one


def _compiled_before():
    if not _KEPT:
        torch._dynamo.reset()
        layer = nn.SyncBatchNorm(3, momentum=1.0)
        _KEPT["layer"] = layer, torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer, program = _KEPT["layer"]
    x = torch.randn(8, 3).add(dist.get_rank())
    with torch.no_grad():
        return torch.equal(program(x), nn.SyncBatchNorm(3)(x)), layer.running_mean


def test_a_program_is_made_anew_for_another_default_group(ranks):
    for size in (2, 3):
        results = ranks(size, _compiled_before)
        assert all(equal and torch.equal(mean, results[0][1]) for equal, mean in results)


def _compiled_one_by_one():
    """More layers than programs that Dynamo makes of a forward."""
    torch._dynamo.reset()
    x, found = torch.randn(4, 3), []
    for group in (None, dist.new_group([0, 1])):
        for _ in range(10):
            layer = nn.SyncBatchNorm(3, process_group=group)
            program = torch.compile(layer, fullgraph=True, backend="aot_eager")
            found.append(torch.equal(program(x), nn.SyncBatchNorm(3)(x)))
    return found


def test_layers_that_are_compiled_one_by_one_share_a_program(ranks):
    assert all(map(all, ranks(2, _compiled_one_by_one)))


def _function_compiled():
    """The function, which is given the group itself; and exchanges counted in the program."""
    group = dist.group.WORLD
    counts = []

    def programs(graph, inputs):
        counts.append(sum("all_gather" in str(n.target) for n in graph.graph.nodes))
        return graph

    def call(x):
        return F.batch_norm(x, None, None, training=True, process_group=group)

    x = torch.randn(4, 3)
    compiled = torch.compile(call, fullgraph=True, backend=programs)
    return torch.equal(compiled(x), call(x)), counts


def test_the_function_in_a_compiled_program(ranks):
    assert ranks(2, _function_compiled) == [(True, [1])] * 2


# What a call has to be given


def test_without_a_process_group_it_evaluates_and_says_what_training_needs():
    norm, x = nn.SyncBatchNorm(3), torch.randn(4, 3)
    with pytest.raises(
        RuntimeError,
        match=r"^SyncBatchNorm: there is no process group: call "
        r"torch\.distributed\.init_process_group before training, or use BatchNorm$",
    ):
        norm(x)
    assert torch.equal(norm.eval()(x), nn.BatchNorm1d(3).eval()(x))
    untracked = nn.SyncBatchNorm(3, track_running_stats=False)
    plain = nn.BatchNorm1d(3, track_running_stats=False)
    assert torch.equal(untracked.eval()(x), plain(x))  # its own batch's, as torch's


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: F.batch_norm(x, None, None, training=True, process_group="all"),
            *(TypeError, "batch_norm: process_group must be a torch.distributed.ProcessGroup or"),
        ),
        (
            lambda x: F.batch_norm_act(
                x, None, None, training=True, process_group=dist.GroupMember.NON_GROUP_MEMBER
            ),
            *(ValueError, "batch_norm_act: process_group must be a process group that this"),
        ),
        (
            lambda x: nn.SyncBatchNorm(3)(x[0]),
            *(
                ValueError,
                r"SyncBatchNorm: input must have at least 2 dimensions, \(N, C, \.\.\.\)",
            ),
        ),
        (
            lambda x: nn.SyncBatchNorm.convert_sync_batchnorm(x),
            *(TypeError, "convert_sync_batchnorm: module must be an nn.Module, got Tensor"),
        ),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 3))


def _errors():
    rank = dist.get_rank()

    def message(call):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    x = torch.randn(4, 3, requires_grad=True)
    norm, others = nn.SyncBatchNorm(3), dist.new_group([0])
    of_gpus = dist.new_group(backend="cuda:gloo")
    mismatched = [nn.SyncBatchNorm(c) for c in (3 + rank // 2, 3)]
    found = [
        message(lambda: mismatched[0](torch.randn(4, 3 + rank // 2))),
        message(lambda: mismatched[1](torch.randn(4, 3))),
        message(lambda: nn.SyncBatchNorm(3, process_group=of_gpus)(x)),
        message(lambda: nn.SyncBatchNorm(3, process_group=others)(x)),
        message(lambda: torch.autograd.grad(norm(x).sum(), x, create_graph=True)),
        message(lambda: torch.func.vjp(norm, x)),
        message(lambda: torch.jit.trace(norm, x, check_trace=False)),
    ]
    return found


def test_errors_name_the_ranks_and_come_on_all_of_them(ranks):
    results = ranks(3, _errors)
    for rank, found in enumerate(results):
        assert found[0] == (
            "RankError: SyncBatchNorm: the input's channels must be the same on all ranks, "
            "got 3 on ranks 0 and 1, 4 on rank 2"
        )
        assert found[1] is None
        assert found[2] == (
            "RuntimeError: SyncBatchNorm: input must be on a device that process_group has a "
            "backend for (cuda), got one on cpu: move it, or make the group with a backend for it, "
            'as init_process_group("cpu:gloo,cuda:nccl")'
        )
        assert found[3] == (
            None
            if rank == 0
            else "ValueError: SyncBatchNorm: process_group must be a process group that this "
            "process is in, got one that it is not in"
        )
        assert "the gradient across ranks has no gradient of its own" in found[4]
        assert "torch.func cannot look into a call with process_group" in found[5]
        assert "torch.jit.trace cannot look into a call with process_group" in found[6]


def _alone():
    torch.manual_seed(0)
    x, g = torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    results = []
    for norm in (nn.SyncBatchNorm(4), nn.BatchNorm1d(4)):
        results.append(trained(norm, x, g, torch.ones(4), torch.zeros(4)))
    return results


def test_a_group_of_one_is_batch_norm(ranks):
    ((ours, plain),) = ranks(1, _alone)
    for a, b in zip(
        [*ours[:2], *ours[2], *ours[3]], [*plain[:2], *plain[2], *plain[3]], strict=True
    ):
        assert torch.equal(a, b)


# Layers and models


class Block(torch_nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch_nn.Conv2d(3, 3, 1)
        self.bn = torch_nn.BatchNorm2d(3)
        self.second = torch_nn.Sequential(torch_nn.BatchNorm2d(3), torch_nn.SiLU())

    def forward(self, x):
        return self.second(torch.relu(self.bn(self.conv(x)) + x))


def convert_sync(net, group=None):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net, group)


ORDERS = {
    "fused, then synchronised": lambda net: convert_sync(reg_kernels.convert(net, fuse=True)),
    "synchronised, then fused": lambda net: reg_kernels.convert(convert_sync(net), fuse=True),
    "torch's, then fused": lambda net: reg_kernels.convert(
        torch_nn.SyncBatchNorm.convert_sync_batchnorm(net), fuse=True
    ),
    "not fused": convert_sync,
}


def without_bias(layer):
    """As the constructor's `bias=False`, which not every torch has."""
    layer.register_parameter("bias", None)
    return layer


def test_a_conversion_changes_the_class_and_nothing_else():
    calls = []
    for make, target in (
        (lambda: torch_nn.BatchNorm2d(3, eps=0.1, momentum=None), nn.SyncBatchNorm),
        (lambda: nn.BatchNorm1d(3, affine=False, backend="reference"), nn.SyncBatchNorm),
        (lambda: without_bias(torch_nn.SyncBatchNorm(3)), nn.SyncBatchNorm),
        (
            lambda: nn.BatchNormAct3d(
                3, activation="leaky_relu", drop=0.3, negative_slope=0.2, backend="reference"
            ),
            nn.SyncBatchNormAct,
        ),
    ):
        layer = make().eval()
        handle = layer.register_forward_hook(lambda *arguments: calls.append(1))
        before, state = dict(layer.__dict__), layer.state_dict()
        net = torch_nn.Sequential(layer, torch_nn.Linear(3, 3))
        assert convert_sync(net) is net and net[0] is layer and type(layer) is target
        assert {**layer.__dict__, "process_group": None} == {**before, "process_group": None}
        assert list(layer.state_dict()) == list(state)
        x = torch.randn(2, 3, 1, 1, 1)
        layer(x if target is nn.SyncBatchNormAct else x[..., 0, 0])
        handle.remove()
        clone = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert type(clone) is target and repr(clone) == repr(layer)
    assert len(calls) == 4


def test_a_layer_that_may_do_something_else_is_refused_and_nothing_changed():
    class Own(torch_nn.BatchNorm2d):
        pass

    net = torch_nn.Sequential(torch_nn.BatchNorm2d(3), Own(3))
    with pytest.raises(
        TypeError,
        match=r"^convert_sync_batchnorm: 1 must be a BatchNorm of torch or of reg_kernels, got "
        r"Own, whose forward may be its own: replace it$",
    ):
        convert_sync(net)
    assert type(net[0]) is torch_nn.BatchNorm2d


def test_torchs_own_is_swapped_and_back():
    net = torch_nn.SyncBatchNorm.convert_sync_batchnorm(Block())
    ours = reg_kernels.convert(net, fuse=True)
    assert {type(m) for m in ours.modules()} >= {nn.SyncBatchNorm}
    back = reg_kernels.revert(ours)
    assert [type(m) for m in back.modules()] == [type(m) for m in net.modules()]
    state = {k: v + 1 for k, v in net.state_dict().items()}
    ours.load_state_dict(state)
    net.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ours.eval()(x), net.eval()(x))


def test_it_folds_away_in_evaluation():
    for net in (
        torch_nn.Sequential(torch_nn.Conv2d(3, 4, 1), nn.SyncBatchNormAct(4)),
        torch_nn.Sequential(torch_nn.Linear(3, 4), nn.SyncBatchNorm(4)),
    ):
        net.eval()[1].running_mean.add_(0.5)
        folded = reg_kernels.fold_batch_norm(net)
        x = torch.randn(2, 3, 4, 4) if isinstance(net[0], torch_nn.Conv2d) else torch.randn(2, 3)
        torch.testing.assert_close(folded(x), net(x))
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in folded.modules())


def steps(net, sizes, rank, wrap):
    """The losses of some steps and the parameters behind them; each rank's loss weighs by what it
    has, so that the mean over the ranks is the whole batch's."""
    model = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(1)
    losses = []
    for _ in range(4):
        x, target = (torch.randn(sum(sizes), 3, 4, 4, dtype=DOUBLE) for _ in range(2))
        x, target = (part_of(t, sizes, rank) for t in (x, target))
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum() / (sum(sizes) * 48) * len(sizes)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach() for p in net.parameters()], list(net.buffers())


def make_net():
    torch.manual_seed(5)
    return torch_nn.Sequential(Block(), Block()).double()


def _ddp(sizes):
    rank, results = dist.get_rank(), {}
    for name, order in ORDERS.items():
        net = order(make_net())
        results[name] = steps(net, sizes, rank, DistributedDataParallel)
    return results


def test_training_under_ddp_is_that_of_one_process(ranks):
    sizes = [5, 3]
    whole = steps(make_net(), [8], 0, lambda net: net)
    results = ranks(2, _ddp, sizes)
    for name in ORDERS:
        losses = sum(r[name][0] for r in results) / 2
        for ours, theirs in ((losses, whole[0]), (results[0][name][1], whole[1])):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(results[1][name][2], whole[2], rtol=1e-12, atol=1e-12)
