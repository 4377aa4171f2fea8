"""What ranks draw of a batch that they share: the bits of one process that has all of it."""

import contextlib
import copy
import itertools
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from process_group import Ranks, running_ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from reg_kernels import _part, adversarial, augment, distributed
from reg_kernels import functional as F
from reg_kernels.nn import (
    BatchNormAct1d,
    Dropout,
    DropPath,
    GaussianNoise,
    StochasticDepthBlock,
    SyncBatchNorm,
    weight_noise,
)

BACKENDS = ("native", "triton", "reference")
TOTAL = 7
# Of 1 to 4 ranks: even, uneven, without a sample on one.
SIZES = ((7,), (3, 4), (4, 0, 3), (0, 2, 4, 1))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks() as pool:
        yield pool


def _each_rank(
    sizes: tuple[int, ...], call: Callable[[slice], Any], each: int | None = None, seed: int = 1
) -> list[Any]:
    """What call(the rank's samples) is on each rank, one after the other; all of them leave their
    generators as one process with the whole batch does."""
    results, states = [], []
    for rank, first in enumerate(itertools.accumulate(sizes, initial=0)):
        if rank == len(sizes):
            break
        torch.manual_seed(seed)
        samples = sizes[rank] if each else None
        with distributed.batch(first, sum(sizes), samples):
            results.append(call(slice(first * (each or 1), (first + sizes[rank]) * (each or 1))))
        states.append(torch.get_rng_state())
    torch.manual_seed(seed)
    call(slice(0, sum(sizes) * (each or 1)))
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)
    return results


def _whole(call: Callable[[slice], Any], length: int = TOTAL, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return call(slice(0, length))


OPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "dropout": (lambda x, **o: F.dropout(x, 0.4, **o), (TOTAL, 3, 5)),
    "dropout of one dimension": (lambda x, **o: F.dropout(x, 0.4, **o), (TOTAL,)),
    "dropout1d": (lambda x, **o: F.dropout1d(x, 0.4, **o), (TOTAL, 5, 3)),
    "dropout2d": (lambda x, **o: F.dropout2d(x, 0.4, **o), (TOTAL, 5, 3, 2)),
    "dropout3d": (lambda x, **o: F.dropout3d(x, 0.4, **o), (TOTAL, 5, 3, 2, 2)),
    "gaussian_noise": (lambda x, **o: F.gaussian_noise(x, 0.4, **o), (TOTAL, 3, 5)),
    "relative noise": (
        lambda x, **o: F.gaussian_noise(x, 0.4, multiplicative=True, **o),
        (TOTAL, 3, 5),
    ),
    "uniform_noise": (lambda x, **o: F.uniform_noise(x, 0.4, **o), (TOTAL, 3, 5)),
    "salt_and_pepper": (lambda x, **o: F.salt_and_pepper(x, 0.4, **o), (TOTAL, 3, 5, 2)),
    "drop_path": (lambda x, **o: F.drop_path(x, 0.4, **o), (TOTAL, 3, 5)),
    "drop_path with a residual": (
        lambda x, **o: F.drop_path(x, 0.4, residual=2 * x, layer_scale=x.new_ones(5), **o),
        (TOTAL, 3, 5),
    ),
    "drop_path of a batch": (lambda x, **o: F.drop_path(x, 0.4, mode="batch", **o), (TOTAL, 3, 5)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "a part of a larger one": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_parts_of_a_batch_draw_the_whole_ones_bits(op: str, backend: str, layout: str) -> None:
    function, shape = OPS[op]
    if layout == "channels last" and len(shape) < 3:
        pytest.skip("it has no channels")
    x = LAYOUTS[layout](torch.randn(shape))

    def call(rows: slice) -> tuple[Tensor, Tensor]:
        part = x[rows].detach().requires_grad_()
        y = function(part, backend=backend)
        y.backward(torch.ones_like(y))
        assert part.grad is not None
        return y.detach(), part.grad

    expected = _whole(call)
    for sizes in SIZES:
        found = _each_rank(sizes, call)
        for parts, all_ in zip(zip(*found, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(parts), all_), sizes


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_and_by_samples_of_several_rows(backend: str) -> None:
    x = torch.randn(TOTAL * 3, 4)  # three rows a sample, as (N * T, C)

    def call(rows: slice) -> Tensor:
        y = F.dropout(x[rows].clone(), 0.3, inplace=True, backend=backend)
        return F.drop_path(F.uniform_noise(y, 1.0, backend=backend), 0.5, backend=backend)

    expected = _whole(call, TOTAL * 3)
    for sizes in SIZES:
        assert torch.equal(torch.cat(_each_rank(sizes, call, each=3)), expected), sizes


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dropout_of_a_chain_is_a_part_of_the_whole_ones(backend: str, layout: str) -> None:
    """By its mask alone, since the statistics are a rank's own."""
    x = LAYOUTS[layout](torch.rand(TOTAL, 3, 4, 5))

    def call(rows: slice) -> Tensor:
        part = x[rows].detach().requires_grad_()
        options: dict[str, Any] = {"activation": None, "drop": 0.4, "backend": backend}
        bias = torch.full((3,), 1e3)  # far from 0, where nothing was dropped
        calls = [  # the second by what is known of the first
            F.batch_norm_act(part, None, None, None, bias, training=True, **options)
            for _ in range(2)
        ]
        return torch.stack(calls, 1) != 0

    expected = _whole(call)
    assert 0.5 < expected.float().mean() < 0.7
    for sizes in SIZES:
        assert torch.equal(torch.cat(_each_rank(sizes, call)), expected), sizes


def test_samples_that_lie_side_by_side_draw_as_a_contiguous_tensor_does() -> None:
    x = torch.randn(4, TOTAL)

    def call(rows: slice) -> Tensor:
        y = F.dropout(x[:, rows].t(), 0.5)
        z = x[:, rows].clone().t()
        assert F.dropout(z, 0.5, inplace=True) is z
        return torch.cat((y, z), 1)

    expected = _whole(lambda rows: torch.cat([F.dropout(x.t().contiguous(), 0.5) for _ in "yz"], 1))
    for sizes in SIZES:
        assert torch.equal(torch.cat(_each_rank(sizes, call)), expected), sizes


def test_a_call_known_from_outside_draws_its_part_inside_and_back() -> None:
    x = torch.ones(3, 40)
    plain = [_whole(lambda rows: F.dropout(x)) for _ in range(3)]
    torch.manual_seed(1)
    with distributed.batch(3, 6):
        part = F.dropout(x)
    again = _whole(lambda rows: F.dropout(x))
    both = _whole(lambda rows: F.dropout(torch.ones(6, 40)))
    assert torch.equal(part, both[3:]) and torch.equal(again, both[:3])
    assert all(torch.equal(y, again) for y in plain)


def test_what_is_given_stays() -> None:
    x, state = torch.ones(2, 50), torch.tensor([3, 4])
    expected = F.dropout(x, rng_state=state), _whole(lambda rows: F.dropout(x, element_offset=9))
    torch.manual_seed(1)
    with distributed.batch(2, 4):
        assert torch.equal(F.dropout(x, element_offset=9), expected[1])
        assert torch.equal(F.dropout(x, rng_state=state), expected[0])


def test_whole_is_the_same_on_all_ranks() -> None:
    x = torch.ones(5, 30)

    def call(rows: slice) -> Tensor:
        with distributed.whole():
            y = F.dropout(x)
        return torch.cat((y, F.dropout(torch.ones(rows.stop - rows.start, 30))))

    expected = _whole(call)
    for found in _each_rank((3, 4), call):
        assert torch.equal(found[:5], expected[:5])


def test_transforms_fakes_and_traces_inside_and_after() -> None:
    x = torch.ones(4, 30)
    vmapped = torch.func.vmap(F.dropout, randomness="different")

    def call() -> None:
        y = vmapped(x)
        assert not torch.equal(y[0], y[1])
        assert set(torch.func.grad(lambda x: F.dropout(x).sum())(x).unique().tolist()) == {0, 2}
        with FakeTensorMode():
            assert F.dropout(torch.ones(4, 3)).shape == (4, 3)
        assert torch.jit.trace(lambda x: F.dropout(x), x, check_trace=False)(x).shape == x.shape

    F.dropout(x)
    with distributed.batch(4, 8, 4):
        F.dropout(x)
        with distributed.whole():
            call()
    call()


def test_weights_have_the_same_noise_on_all_ranks() -> None:
    torch.manual_seed(0)
    layer = weight_noise(nn.Linear(4, 5), 0.5)
    x = torch.randn(TOTAL, 4)

    def call(rows: slice) -> Tensor:
        return layer(x[rows])

    expected = _whole(call)
    for sizes in SIZES:
        torch.testing.assert_close(torch.cat(_each_rank(sizes, call)), expected)


@pytest.mark.parametrize("mode", ["batch", "subset", "row"])
def test_a_stochastic_depth_block_chooses_of_the_batch_of_all_ranks(mode: str) -> None:
    """The branch draws too: of what was chosen, which its parts are parts of."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(4, 4), Dropout(0.5), DropPath(0.3))
    block = StochasticDepthBlock(branch, 0.5, mode).double()
    x = torch.randn(TOTAL, 4, dtype=torch.float64)

    def call(rows: slice, again: bool = False) -> tuple[Tensor, Tensor]:
        part = x[rows].detach().requires_grad_()
        y = checkpoint(block, part, use_reentrant=False) if again else block(part)
        y.square().sum().backward()
        assert part.grad is not None
        return y.detach(), part.grad

    for seed in range(4):
        expected = _whole(call, seed=seed)
        for sizes, again in itertools.product(SIZES, (False, True)):
            found = _each_rank(sizes, lambda rows, again=again: call(rows, again), seed=seed)  # type: ignore[misc]
            for parts, all_ in zip(zip(*found, strict=True), expected, strict=True):
                torch.testing.assert_close(torch.cat(parts), all_, rtol=1e-12, atol=1e-12)


def test_a_rank_of_a_subset_without_samples_computes_its_branch() -> None:
    """So that its parameters have a gradient, which DDP waits for."""
    block = StochasticDepthBlock(nn.Linear(3, 3), 0.5, "subset")
    with distributed.batch(4, 4):
        block(torch.randn(0, 3)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


# Sharded modules


class _Net(nn.Module):
    def __init__(self, recomputes: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), Dropout(0.3), GaussianNoise(0.2))
        self.second = nn.Sequential(Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), Dropout(0.5))
        self.drop, self.last = DropPath(0.4), nn.Linear(8, 3)
        self.recomputes = recomputes  # None: nothing; else use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.recomputes is None:
            y = self.second(x)
        else:
            y = checkpoint(self.second, x, use_reentrant=self.recomputes)
        result: Tensor = self.last(self.drop(y, x))
        return result


def _net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return _Net(**options).double()


def test_a_module_of_a_rank_draws_its_part_in_training_alone() -> None:
    x = torch.randn(6, 6, dtype=torch.float64)
    expected = _whole(lambda rows: _net()(x), seed=0)
    for rank in range(3):
        net = distributed.shard(_net(), rank, 3)
        y = net(x[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(y, expected[2 * rank : 2 * rank + 2], rtol=1e-12, atol=1e-12)
        assert _part.current() is None
        assert torch.equal(net.eval()(x), _net().eval()(x))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_draw_again_what_they_drew(recomputes: bool, inside: bool) -> None:
    """Two forwards of different parts before one backward, which runs outside of any part or
    inside of another one."""
    x = torch.randn(9, 6, dtype=torch.float64)

    def gradients(recomputes: bool | None) -> list[Tensor]:
        net = distributed.shard(_net(recomputes=recomputes))
        loss = torch.zeros((), dtype=torch.float64)
        for first, end in ((4, 6), (2, 5)):
            with distributed.batch(first, 9):
                loss = loss + net(x[first:end].clone().requires_grad_()).square().sum()
        if inside:
            with distributed.batch(1, 9):
                loss.backward()
        else:
            loss.backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    with _GroupOfOne():
        expected, found = gradients(None), gradients(recomputes)
    assert all(map(torch.equal, found, expected))


class _GroupOfOne:
    """`shard` of a group, whose sizes are stated by `distributed.batch`."""

    def __enter__(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()


def test_copies_pickles_state_dicts_and_unshard() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    net = _net()
    plain = _whole(lambda rows: net(x))
    keys = list(net.state_dict())
    assert distributed.shard(net, 1, 2) is net and list(net.state_dict()) == keys
    part = _whole(lambda rows: net(x))
    assert not torch.equal(part, plain)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(_whole(lambda rows, other=other: other(x)), part)  # type: ignore[misc]
        assert distributed.unshard(other) is other
        assert torch.equal(_whole(lambda rows, other=other: other(x)), plain)  # type: ignore[misc]
    distributed.shard(net, 0, 2)  # anew, not twice
    assert len(net._forward_pre_hooks) == len(net._forward_hooks) == 1
    assert torch.equal(_whole(lambda rows: net(x)), plain)


def test_an_error_in_a_forward_leaves_no_part_in_force() -> None:
    net = distributed.shard(_net(), 0, 2)
    with pytest.raises(RuntimeError, match="mat1"):
        net(torch.randn(2, 5, dtype=torch.float64))
    assert _part.current() is None


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_net_is_compiled_anew_for_another_part_alone(
    outside: bool, fullgraph: bool
) -> None:
    torch._dynamo.reset()
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x, net = torch.randn(8, 6, dtype=torch.float64), _net()
    options: dict[str, Any] = {"backend": counted, "fullgraph": fullgraph, "dynamic": False}
    expected = _whole(lambda rows: torch.compile(net, **options)(x))
    if outside:
        compiled: Any = distributed.shard(torch.compile(net, **options), 0, 2)
    else:
        compiled = torch.compile(distributed.shard(net, 0, 2), **options)
    graphs.clear()
    for first in (0, 4, 4, 0):
        torch.manual_seed(1)
        with distributed.batch(first, 8):
            y = compiled(x[first : first + 4])
        torch.testing.assert_close(y, expected[first : first + 4], rtol=1e-12, atol=1e-12)
    assert len(graphs) == 2
    y = _whole(lambda rows: compiled(x[:4]))  # by the rank and the number of ranks
    torch.testing.assert_close(y, expected[:4], rtol=1e-12, atol=1e-12)
    assert len(graphs) == 2
    torch._dynamo.reset()


class _Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with distributed.whole():
            y = F.dropout(x.t().contiguous()).t()
        return torch.cat((y, F.dropout(x)), 1)


def test_a_compiled_net_may_have_whole_inside() -> None:
    torch._dynamo.reset()
    net = torch.compile(_Turned(), backend="eager", fullgraph=True)
    found = []
    for first in (0, 4):
        torch.manual_seed(1)
        with distributed.batch(first, 8):
            found.append(net(torch.ones(4, 9)))
        assert _part.current() is None
    expected = _whole(lambda rows: net(torch.ones(8, 9)))[:, 9:]
    assert torch.equal(found[0][:, :9], found[1][:, :9])
    assert torch.equal(torch.cat(found)[:, 9:], expected)
    torch._dynamo.reset()


def test_a_warning_names_torchs_own_layers() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), Dropout(0.1), nn.Dropout(0.0))
    with pytest.warns(UserWarning, match=r"draw the same on all ranks, got 1: call reg_kernels"):
        distributed.shard(net, 0, 1)


# Batches that are mixed, augmented, attacked


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_mixup_has_the_lambdas_of_the_batch_of_all_ranks(mode: str, seed: int | None) -> None:
    x, target = torch.rand(TOTAL, 3, 8, 8), torch.arange(TOTAL)

    def drawn(rows: slice) -> Any:
        mixup = augment.Mixup(1.0, 1.0, mode=mode, seed=seed, num_classes=TOTAL)
        for _ in range(2):  # the second by the state that the first leaves
            _, mixed = mixup(x[rows], target[rows])
        return mixed.lam.expand(rows.stop - rows.start)

    expected = _whole(drawn)
    for sizes in SIZES:
        found = torch.cat(_each_rank(sizes, drawn))
        if mode != "pair" or len(sizes) == 1:  # pairs are others then
            assert torch.equal(found, expected), sizes
        elif mode == "pair":
            pairs = [p[: len(p) // 2].tolist() for p in _each_rank(sizes, drawn)]
            assert len(set(itertools.chain(*pairs))) == sum(map(len, pairs))
    shards = [distributed.shard(augment.Mixup(mode=mode), rank, 2) for rank in range(2)]
    lams = [_whole(lambda rows, m=m: m(x[:3], target[:3])[1].lam) for m in shards]  # type: ignore[misc]
    assert torch.equal(*lams) == (mode == "batch")


@pytest.mark.parametrize("mixup", [None, augment.Mixup(mode="batch"), augment.Mixup(mode="elem")])
@pytest.mark.parametrize("same_on_batch", [False, True])
def test_a_pipeline_counts_through_the_batches_of_all_ranks(
    mixup: augment.Mixup | None, same_on_batch: bool
) -> None:
    images, target = torch.rand(TOTAL, 3, 9, 9), torch.arange(TOTAL)

    def made(sizes: tuple[int, ...], first: int) -> Any:
        transforms = [
            augment.RandomCrop(7),
            augment.RandomHorizontalFlip(),
            augment.ColorJitter(0.5),
        ]
        pipeline = augment.Pipeline(
            *transforms, *([mixup] if mixup else []), seed=3, same_on_batch=same_on_batch
        )
        rows = slice(first, first + sizes[0])
        results = []
        for _ in range(2):
            with distributed.batch(first, TOTAL):
                *_, params = pipeline(images[rows], target[rows], return_params=True)
            names = [name for name in params.columns if name != "Mixup.partner"]
            results.append(torch.stack([params[name] for name in names], 1))
        assert pipeline.state_dict()["position"] == 2 * TOTAL
        return torch.stack(results, 1)

    expected = made((TOTAL,), 0)
    for sizes in SIZES:
        firsts = itertools.accumulate(sizes, initial=0)
        found = [made((n,), first) for n, first in zip(sizes, firsts, strict=False)]
        assert torch.equal(torch.cat(found), expected), sizes


def test_a_pipeline_without_images_gives_what_its_batch_would_be_like() -> None:
    pipeline = distributed.shard(augment.Pipeline(augment.CenterCrop(4), seed=1), 0, 2)
    images, target = pipeline(torch.rand(0, 3, 9, 9), torch.arange(0))
    assert images.shape == (0, 3, 4, 4) and len(target) == 0
    with pytest.raises(ValueError, match="at least, got an empty one"):
        distributed.unshard(pipeline)(torch.rand(0, 3, 9, 9))
    mixing = augment.Pipeline(augment.CenterCrop(4), augment.Mixup(num_classes=3), seed=1)
    for indices in (None, torch.arange(0)):
        images, mixed = distributed.shard(mixing, 1, 2)(
            torch.rand(0, 3, 9, 9), torch.arange(0), indices=indices
        )
        assert images.shape == (0, 3, 4, 4) and mixed.to_dense(3).shape == (0, 3)
    distributed.shard(pipeline, 0, 2)
    given = pipeline(torch.rand(2, 3, 9, 9), indices=[4, 9], return_params=True)[1]
    assert given["index"].tolist() == [4, 9] and pipeline.state_dict()["position"] == 0


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_start_where_they_would_in_one_process(norm: str, given: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), Dropout(0.5))
    x, target = torch.rand(TOTAL, 6), torch.arange(TOTAL) % 4

    def call(rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(2) if given else None
        attack = adversarial.PGD(net, 0.3, 0.1, 2, norm, restarts=2, generator=generator)
        return attack(x[rows], target[rows])

    expected = _whole(call)
    for sizes in SIZES:
        torch.testing.assert_close(torch.cat(_each_rank(sizes, call)), expected)


def test_trades_starts_where_it_would_in_one_process() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), Dropout(0.5)).double()
    x, target = torch.rand(TOTAL, 6, dtype=torch.float64), torch.arange(TOTAL) % 4

    def call(rows: slice) -> Tensor:
        n = rows.stop - rows.start
        loss = (
            adversarial.trades_loss(net, x[rows], target[rows], perturb_steps=2)
            if n
            else x[0, 0] * 0
        )
        return loss.detach() * (n / TOTAL)

    expected = _whole(call)
    for sizes in ((7,), (3, 4)):
        torch.testing.assert_close(sum(_each_rank(sizes, call)), expected)


# Real ranks

STEPS = (8, 8, 5, 2)  # samples of each step's batch: the last ones leave ranks with fewer, or none


def _deep_net() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Dropout(0.3)) for _ in range(3)]
    modes = ("subset", "row", "subset")
    paths = [StochasticDepthBlock(b, 0.4, m) for b, m in zip(blocks, modes, strict=True)]
    front = [weight_noise(nn.Linear(6, 8), 0.1), GaussianNoise(0.2)]
    chain = BatchNormAct1d(8, activation="silu", drop=0.3)
    return nn.Sequential(*front, *paths, chain, nn.Linear(8, 3)).double()


def _losses(net: nn.Module, how: str, keeps_whole: bool = True) -> list[float]:
    """Trains, and returns the losses of each step, of all ranks. `how`: "alone" knows of no ranks,
    "batch" states the part of each batch, and "group" leaves it to the process group."""
    alone = how == "alone"
    size = 1 if alone else dist.get_world_size()
    optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for total in STEPS:
        x = torch.randn(total, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(total, 3, generator=generator, dtype=torch.float64)
        rows = slice(0, total) if alone else distributed.part(total)
        stated: Any = contextlib.nullcontext()
        if how == "batch":
            stated = distributed.batch(rows.start, total)
        with stated:
            loss = (net(x[rows]) - y[rows]).square().sum() / total
        optimizer.zero_grad()
        (loss * size).backward()  # gradients are averaged over ranks
        optimizer.step()
        value = loss.detach().clone()
        if not alone:
            dist.all_reduce(value)
        losses.append(value.item())
        if not alone and dist.get_rank() == 0 and keeps_whole:
            with torch.no_grad():  # one rank alone: nothing is communicated
                net.eval()(x)
                net.train()
    return losses


def _trained(how: str, wrapped: str) -> tuple[list[float], list[Tensor]]:
    """The losses of each step, and the parameters at the end."""
    net = SyncBatchNorm.convert_sync_batchnorm(_deep_net())
    torch.manual_seed(5)
    if how == "group" and wrapped != "outside":
        distributed.shard(net)
    if wrapped == "fsdp":
        fully_shard(net)
    else:
        # Else it would broadcast them in evaluation as well.
        net = DistributedDataParallel(net, broadcast_buffers=False)
        if wrapped == "outside":
            distributed.shard(net)
    losses = _losses(net, how, keeps_whole=wrapped != "fsdp")
    parameters = [p.detach() for p in net.parameters()]
    return losses, [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def _trained_in_every_way() -> list[tuple[list[float], list[Tensor]]]:
    ways = (("group", "inside"), ("group", "outside"), ("batch", "inside"), ("group", "fsdp"))
    return [_trained(*way) for way in ways]


def _alone() -> tuple[list[float], list[Tensor]]:
    net = _deep_net()
    torch.manual_seed(5)
    return _losses(net, "alone"), [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_train_to_the_losses_of_one_process(ranks: Ranks, size: int) -> None:
    losses, parameters = _alone()
    for ways in ranks(size, _trained_in_every_way):
        for found_losses, found in ways:
            torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found, parameters, rtol=1e-12, atol=1e-12)


def _on_a_group() -> list[str]:
    """What differs between ranks is said on all of them, and groups are parts of the world."""
    rank = dist.get_rank()
    said = []

    def refused(call: Callable[[], Any]) -> None:
        try:
            call()
            said.append("")
        except (RuntimeError, TypeError, ValueError) as error:
            said.append(str(error))

    torch.manual_seed(0 if rank != 0 else 9)
    refused(lambda: distributed.shard(nn.Identity()))
    torch.manual_seed(rank % 2)
    refused(lambda: distributed.shard(nn.Identity()))
    refused(
        lambda: distributed.shard(augment.Pipeline(augment.CenterCrop(2), seed=4 + (rank == 2)))
    )
    refused(lambda: distributed.shard(augment.Mixup(seed=rank // 3)))
    refused(lambda: distributed.shard(augment.Mixup(seed=2)))
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        torch.manual_seed(0)
        drop = distributed.shard(Dropout(), process_group=group)
        assert len(copy.deepcopy(drop)(torch.ones(rank, 2))) == rank
        refused(lambda: pickle.dumps(drop))
        torch.manual_seed(0)
        y = drop(torch.ones(rank, 50))
        torch.manual_seed(0)
        assert torch.equal(y, F.dropout(torch.ones(4, 50))[1 if rank == 3 else 0 :][:rank])
    else:
        refused(lambda: distributed.shard(Dropout(), process_group=group))
    refused(lambda: distributed.shard(Dropout(), process_group="all"))  # type: ignore[arg-type]
    return said


def test_a_group_says_which_ranks_differ(ranks: Ranks) -> None:
    seed = "call torch.manual_seed with one seed on all ranks"
    expected = [
        f"shard: the ranks' generators must be in one state, got another one on rank 0 than on "
        f"rank 1: {seed}",
        f"shard: the ranks' generators must be in one state, got another one on ranks 1 and 3 than "
        f"on rank 0: {seed}",
        "shard: the ranks' pipelines must be in one state, got another one on rank 2 than on rank "
        "0: give each the same seed=, epoch and position",
        "shard: the ranks' Mixups must be in one state, got another one on rank 3 than on rank 0: "
        "give each the same seed=",
        "",
    ]
    for rank, said in enumerate(ranks(4, _on_a_group)):
        assert said[:5] == expected
        assert ("is pickled" if rank % 2 else "one that this process is in") in said[5]
        assert said[6:] == ["shard: process_group must be a ProcessGroup or None, got str"]


class _Mixes:
    def __init__(self, mixup: augment.Mixup, within: bool) -> None:
        self.mixup, self.within = mixup, within

    def __call__(self, items: list[Any]) -> Any:
        if self.within:
            distributed.shard(self.mixup)
        return self.mixup(torch.ones(len(items), 3, 4, 4), torch.tensor([0] * len(items)))[0]


def _in_workers(how: str, within: bool) -> str:
    # Python lets no daemon, which a rank of these tests is, have children.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    mixup = augment.Mixup(0.2, num_classes=3)
    if not within:
        distributed.shard(mixup)
    loader = torch.utils.data.DataLoader(
        list(range(4)),  # type: ignore[arg-type]
        batch_size=2,
        num_workers=1,
        collate_fn=_Mixes(mixup, within),
        multiprocessing_context=how,
        timeout=200,
    )
    try:
        next(iter(loader))
    except RuntimeError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fork", "shard: what is sharded must be called in the process that joined"),
        ("spawn", "shard: rank must be given with world_size, or torch.distributed"),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_workers_of_a_data_loader_do_not_wait_for_other_ranks(
    ranks: Ranks, how: str, message: str, within: bool
) -> None:
    for said in ranks(2, _in_workers, how, within):
        assert message in said


def _in_a_subgroup() -> str:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return ""
    torch.manual_seed(dist.get_rank())
    try:
        distributed.shard(nn.Identity(), process_group=group)
    except distributed.RankError as error:
        return str(error)
    return "not refused"


def test_ranks_of_a_subgroup_are_named_by_their_number_among_all(ranks: Ranks) -> None:
    for said in ranks(3, _in_a_subgroup)[1:]:
        assert "got another one on rank 2 than on rank 1:" in said


# Bad input


def test_errors_say_which_and_what_to_do() -> None:
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: distributed.shard(_net(), 2, 2), ValueError, "shard: rank must be from 0 to 1"),
        (lambda: distributed.shard(_net(), -1, 2), ValueError, "shard: rank must be from 0 to 1"),
        (lambda: distributed.shard(_net(), 0, 0), ValueError, "world_size must be at least 1"),
        (lambda: distributed.shard(_net(), 0), ValueError, "world_size must be given"),
        (
            lambda: distributed.shard(_net()),
            RuntimeError,
            "init_process_group called before, got no",
        ),
        (lambda: distributed.shard(F.dropout, 0, 1), TypeError, "got function"),  # type: ignore[type-var]
        (lambda: distributed.batch(5, 4), ValueError, "first must be at most total, 4, got 5"),
        (lambda: distributed.batch(-1, 4), ValueError, "first must be at least 0"),
        (lambda: distributed.batch(2, 4, 3), ValueError, "samples must be from 0 to 2"),
        (lambda: distributed.batch(0.5, 4), TypeError, "first must be an integer"),  # type: ignore[arg-type]
        (lambda: distributed.part(4, 2, 2), ValueError, "part: rank must be from 0 to 1"),
        (lambda: distributed.part(-1, 0, 2), ValueError, "total must be at least 0"),
        (lambda: distributed.part(4), RuntimeError, "part: rank must be given with world_size"),
        (lambda: distributed.shard(_net(), 0, 1)(), RuntimeError, "a tensor .* got none"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    net = distributed.shard(nn.Sequential(nn.Flatten(0), Dropout()), 0, 1)
    with distributed.batch(0, 4, 2):
        for shape in ((5, 2), ()):
            with pytest.raises(RuntimeError, match=r"dropout: input must be .* 2 samples: .*whole"):
                F.dropout(torch.ones(shape))
    net(torch.ones(4))
    assert _part.current() is None


@pytest.mark.parametrize("total", [0, 1, 5, 8])
def test_part_is_tensor_splits_rule(total: int) -> None:
    x = torch.arange(total)
    for size in (1, 2, 3, 8):
        parts = [x[distributed.part(total, rank, size)] for rank in range(size)]
        assert all(map(torch.equal, parts, x.tensor_split(size)))


class _Calls(nn.Module):
    """Drops by itself after a call of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = Dropout(0.5)

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        if again:
            self(x, False)
        result: Tensor = self.drop(x)
        return result


def test_a_model_that_calls_itself_has_its_part_afterwards() -> None:
    def output(rank: int, world_size: int) -> Tensor:
        torch.manual_seed(0)
        model = distributed.shard(_Calls(), rank, world_size)
        result: Tensor = model(torch.ones(8 // world_size, 16))
        return result

    assert torch.equal(torch.cat([output(0, 2), output(1, 2)]), output(0, 1))
