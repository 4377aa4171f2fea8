"""The optimizer step on a GPU: against the reference, the same bits twice, CUDA graphs, no waiting.

Skipped without a GPU; `make gpu-report` runs it, and tests/ops and tests/optim on the GPU as well.
Tests with "short" in their name are those that it runs under compute-sanitizer.
"""

import copy

import pytest
import torch

from reg_kernels import optim
from reg_kernels.ops.optimizer_step import (
    ALGORITHMS,
    MOST_GROUPS,
    OP,
    ROUNDINGS,
    Hyperparameters,
    PreparedStep,
    StepLists,
    StepSettings,
)

from support import captured, implementations, no_waiting, rng_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton

PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
pairs = pytest.mark.parametrize(
    ("dtype", "moments"), PAIRS, ids=[f"{a}-{b}".replace("torch.", "") for a, b in PAIRS]
)

# Every path once: no element, odd ends, whole chunks, more than one.
SHORT = (0, 1, 7, 1001, 8192, 8193, 20_001)
GROUP = Hyperparameters(0.1, 0.5, 0.2, 0.0, 0.9, 0.99, 1e-3, 0.75, "decoupled", False, False)


class Step:
    """The op's arguments, random; `shift` elements past an aligned address."""

    def __init__(
        self,
        sizes,
        dtype,
        moments=None,
        algorithm="adam",
        groups=(GROUP,),
        rounding="nearest",
        second=True,  # amsgrad, or momentum
        ema=False,
        shift=0,
    ):
        adam, moments = algorithm == "adam", moments or dtype
        generator = torch.Generator().manual_seed(len(sizes))

        def values(kind, positive=False, scale=1.0):
            result = []
            for n in sizes:
                x = scale * torch.randn(n + shift, generator=generator, dtype=torch.float64)
                result.append((x.square() if positive else x).to(kind).to(CUDA)[shift:])
            return result

        offsets = [0]
        for n in sizes:
            offsets.append(offsets[-1] + -(-n // 8) * 8)
        self.algorithm, self.rounding, self.groups = algorithm, rounding, groups
        self.grads = values(dtype)
        self.lists = StepLists(
            values(dtype),
            self.grads,
            [torch.full((), float(i % 3), device=CUDA) for i in range(len(sizes))],
            values(moments, scale=0.1) if adam or second else [],
            values(moments, True) if adam else [],
            values(moments, True) if adam and second else [],
            values(torch.promote_types(dtype, torch.float32)) if ema else [],
            values(dtype, scale=1e-3) if rounding == "kahan" else [],
            [i % len(groups) for i in range(len(sizes))],
            offsets[:-1],
        )

    def common(self, rates=(), squares=None, max_norm=0.0, grad_scale=None, found_inf=None):
        return (
            [x for g in self.groups for x in g.numbers()],
            [g.flags() for g in self.groups],
            list(rates),
            ROUNDINGS.index(self.rounding),
            *(squares, max_norm, grad_scale, found_inf),
            rng_state() if self.rounding == "stochastic" else None,
        )

    def run(self, backend, **options):
        """The state after a step, of copies."""
        of = copy.deepcopy(self.lists)
        OP.overloads[backend](ALGORITHMS.index(self.algorithm), *of, *self.common(**options))
        return of


def state(lists):
    return {name: value for name, value in lists._asdict().items() if "offsets" not in name}


def assert_same_bits(a, b):
    for name, tensors in state(a).items():
        for x, y in zip(tensors, getattr(b, name), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def assert_close(a, b):
    """Within two roundings of where a number is kept, and some of where it was computed."""
    compute = torch.promote_types(a.params[0].dtype, torch.float32)
    for name, tensors in state(a).items():
        if name in ("groups", "compensations"):
            continue
        for x, y in zip(tensors, getattr(b, name), strict=True):
            unit = max(2 * torch.finfo(x.dtype).eps, 16 * torch.finfo(compute).eps)
            torch.testing.assert_close(
                x, y, rtol=unit, atol=unit, msg=lambda m, n=name: f"{n}: {m}"
            )
    # What rounding took off counts: together they are more exact than either.
    for x, c, y, d in zip(a.params, a.compensations, b.params, b.compensations, strict=False):
        unit = 8 * torch.finfo(x.dtype).eps ** 2
        torch.testing.assert_close(
            x.double() + c.double(), y.double() + d.double(), rtol=unit, atol=unit
        )


VARIANTS = {
    "adam": {"second": False},
    "amsgrad": {"ema": True, "shift": 1},
    "l2 l1": {"groups": (GROUP._replace(decay="l2", l1=0.5, maximize=True), GROUP)},
    "sgd": {"algorithm": "sgd", "second": False, "shift": 3},
    "momentum": {"algorithm": "sgd", "groups": (GROUP._replace(beta2=0.3),), "ema": True},
    "nesterov": {
        "algorithm": "sgd",
        "groups": (GROUP._replace(beta2=0.0, nesterov=True, decay="l2"),),
    },
}


@kernels
@pairs
@pytest.mark.parametrize("variant", VARIANTS)
def test_short_is_the_reference_twice_with_the_same_bits(variant, dtype, moments, backend):
    step = Step(SHORT, dtype, moments, **VARIANTS[variant])
    own = step.run(backend)
    assert_close(own, step.run("reference"))
    assert_same_bits(own, step.run(backend))


@kernels
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_short_rounding(moments, rounding, shift, backend):
    step = Step(SHORT, torch.bfloat16, moments, rounding=rounding, ema=True, shift=shift)
    own, truth = step.run(backend), step.run("reference")
    assert_close(own, truth)
    assert_same_bits(own, step.run(backend))
    if rounding == "stochastic":
        for x, y in zip(own.params, truth.params, strict=True):
            # The same draws; another bit only where a rounding of float32 decides about a carry.
            assert int((x != y).sum()) <= 1 + x.numel() // 500


@kernels
def test_short_what_is_read_on_the_device(backend):
    on_device = GROUP._replace(lr=float("nan"), decay="decoupled_lr", rate_on_device=True)
    groups = (GROUP, on_device) * (MOST_GROUPS // 2)
    step = Step((5,) * 70, torch.float32, groups=groups, ema=True)
    options = {
        "rates": [torch.tensor(0.01 * i, device=CUDA) for i in range(MOST_GROUPS // 2)],
        "squares": torch.tensor([3.0, 0.0, 9.5], dtype=torch.float64, device=CUDA),
        "max_norm": 0.3,
        "grad_scale": torch.tensor(4.0, device=CUDA),
        "found_inf": torch.zeros((), device=CUDA),
    }
    own = step.run(backend, **options)
    assert_close(own, step.run("reference", **options))
    options["found_inf"] += 1
    assert_same_bits(step.run(backend, **options), step.lists)


@kernels
def test_short_tensors_without_elements_count_their_steps(backend):
    step = Step((0,) * 1100, torch.float32)
    own = step.run(backend)
    expected = [float(i % 3) + 1 for i in range(1100)]
    assert torch.stack(own.steps).tolist() == expected


@kernels
def test_graph_capture_follows_what_is_on_the_device(backend):
    step = Step(
        SHORT, torch.float32, groups=(GROUP._replace(lr=float("nan"), rate_on_device=True),)
    )
    rate, found = torch.tensor(0.1, device=CUDA), torch.zeros((), device=CUDA)
    common = step.common(rates=[rate], found_inf=found)
    warm = PreparedStep("adam", copy.deepcopy(step.lists))
    eager = PreparedStep("adam", copy.deepcopy(step.lists))
    prepared = PreparedStep("adam", step.lists)
    replay, _ = captured(
        lambda: prepared.run(step.grads, backend, common),
        lambda: warm.run(step.grads, backend, common),
    )
    for lr, inf in ((0.1, 0), (0.03, 0), (0.03, 1), (0.2, 0)):
        rate.fill_(lr)
        found.fill_(inf)
        for g in step.grads:
            g.mul_(1.1)
        replay()
        eager.run(step.grads, backend, common)
        assert_same_bits(step.lists, eager.lists)
        assert float(prepared.table.scratch[0]) == 0
    assert [float(s) for s in step.lists.steps] == [i % 3 + 3 for i in range(len(SHORT))]


@kernels
def test_an_optimizer_in_a_graph(backend):
    results = []
    for in_a_graph in (False, True):
        torch.manual_seed(1)
        params = [torch.randn(n, device=CUDA, requires_grad=True) for n in SHORT]
        for p in params:
            p.grad = torch.randn_like(p)
        lr = torch.tensor(0.1, device=CUDA)
        optimizer = optim.AdamW(params, lr=lr, max_grad_norm=1.0, backend=backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        run = optimizer.step
        if in_a_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            run = graph.replay
        for i in range(3):
            lr.fill_(0.1 / (1 + i))
            run()
        results.append([p.detach() for p in params])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@kernels
def test_a_step_does_not_wait_for_the_device(backend):
    step = Step(SHORT, torch.bfloat16, torch.float32, rounding="stochastic")
    prepared = PreparedStep("adam", step.lists)
    common = step.common(grad_scale=torch.tensor(4.0, device=CUDA))
    prepared.run(step.grads, backend, common)
    with no_waiting():
        prepared.run(step.grads, backend, common)


@kernels
def test_more_than_2_to_the_31_elements(backend):
    size = 2**31 + 20_001
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("not enough free GPU memory")
    group = GROUP._replace(weight_decay=0.0, lr=0.5, beta2=0.0)
    param = torch.ones(size, dtype=torch.bfloat16, device=CUDA)
    grad = torch.full_like(param, 2.0)
    lists = StepLists([param], [grad], groups=[0], element_offsets=[0])
    settings = StepSettings([*group.numbers()], [group.flags()], [])
    PreparedStep("sgd", lists).run([grad], backend, settings)
    assert not param.any()
