"""When it stops, what it keeps, and what is in the model afterwards."""

import copy
import io
import math
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch import nn

from reg_kernels import optim
from reg_kernels.training import EarlyStopping, StopReason, _weights, early_stopping

from support import run_program

NAN, INF = math.nan, math.inf


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def mark(model, number):
    """Writes the number everywhere: into parameters and buffers."""
    with torch.no_grad():
        for x in model.state_dict().values():
            x.fill_(number)


def marked(model):
    """The number that is everywhere."""
    (found,) = {v for x in model.state_dict().values() for v in x.flatten().tolist()}
    return found


def run(stop, values):
    """A run to which each value comes as soon as the weights have its check's number; the number of
    the check that stopped it."""
    for value in values:
        number = stop.checks + 1
        mark(stop.model, number)
        if stop(value):
            return number
    return None


def checked(values, patience=2, **options):
    stop = EarlyStopping(net(), patience, **options)
    return run(stop, values), stop


class LateReader(early_stopping._Reader):
    """A device whose values are there when they are waited for."""

    def __init__(self):
        self.waiting = 0

    def is_late(self, value):
        return True

    def start(self, values):
        self.waiting += 1
        numbers = values.tolist()

        def wait():
            self.waiting -= 1
            return numbers

        return wait


@pytest.fixture
def late(monkeypatch):
    reader = LateReader()
    monkeypatch.setattr(EarlyStopping, "_reader", reader)
    return reader


# When and why


@pytest.mark.parametrize(
    ("values", "options", "stopped_at", "reason", "best_check"),
    [
        ([3, 2, 2, 2.5, 1], {}, 4, StopReason.PATIENCE, 2),
        ([1, 2, 2, 1.5], {"mode": "max"}, 4, StopReason.PATIENCE, 2),
        ([3, 4, 2, 4, 1, 4], {}, None, None, 5),
        ([3, 3], {"patience": 0}, 2, StopReason.PATIENCE, 1),  # not at the first, nor at a better
        ([3, 2, 1, 1], {"patience": 0}, 4, StopReason.PATIENCE, 3),
        ([3, 3], {"patience": 1}, 2, StopReason.PATIENCE, 1),
        # Before start_from nothing counts, but NaN.
        ([0, 9, 9, 9, 8, 8, 8], {"start_from": 3}, 7, StopReason.PATIENCE, 5),
        ([0, NAN], {"start_from": 3}, 2, StopReason.NOT_FINITE, None),
        ([5, 0.1], {"start_from": 2, "stopping_threshold": 1}, None, None, None),
        # NaN and infinity.
        ([3, NAN], {}, 2, StopReason.NOT_FINITE, 1),
        ([3, INF], {"mode": "max"}, 2, StopReason.NOT_FINITE, 1),
        ([NAN, 3, NAN, 2, NAN, NAN], {"check_finite": False}, 6, StopReason.PATIENCE, 4),
        ([INF, NAN], {"check_finite": False}, 2, StopReason.PATIENCE, None),
        # A threshold: as good as it is enough, and that check is the best. Where none is reached
        # there are best weights all the same, and patience counts.
        ([3, 2, 5], {"stopping_threshold": 2}, 2, StopReason.THRESHOLD, 2),
        ([1, 2, 5], {"stopping_threshold": 2, "mode": "max"}, 2, StopReason.THRESHOLD, 2),
        ([5, 4, 4, 4], {"stopping_threshold": 2}, 4, StopReason.PATIENCE, 2),
        ([3, 4, 4.5], {"divergence_threshold": 4}, 3, StopReason.DIVERGED, 1),
        ([3, 2, 1], {"divergence_threshold": 2, "mode": "max"}, 3, StopReason.DIVERGED, 1),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_stops(values, options, stopped_at, reason, best_check, mirrored):
    if mirrored:  # the same of the negative values
        values = [-v for v in values]
        options = {k: -v if "threshold" in k else v for k, v in options.items()}
        options["mode"] = "min" if options.get("mode") == "max" else "max"
    found, stop = checked(values, **options)
    assert (found, stop.reason, stop.best_check) == (stopped_at, reason, best_check)
    assert stop.best == (None if best_check is None else values[best_check - 1])
    assert stop.stopped is (reason is not None) and stop.checks == (found or len(values))
    mark(stop.model, 99)
    stop.restore()
    assert marked(stop.model) == (best_check or 99)


@pytest.mark.parametrize(
    ("start", "change"), [(4.0, 0.5), (-4.0, 0.5), (4.0, 0.25), (-4.0, 0.25), (0.0, 0.25)]
)
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("delta_mode", ["abs", "rel"])
def test_an_improvement_beats_by_more_than_min_delta(start, change, mode, delta_mode):
    """Whatever the signs of mode and value."""
    min_delta = change / 4 if delta_mode == "rel" else change
    needed = min_delta * abs(start) if delta_mode == "rel" else min_delta
    better = -1 if mode == "min" else 1
    options = {"min_delta": min_delta, "min_delta_mode": delta_mode, "mode": mode}
    for gain, improves in ((needed, False), (needed + 0.125, True), (-needed - 0.125, False)):
        _, stop = checked([start, start + better * gain], 5, **options)
        assert stop.wait == (0 if improves else 1), gain


def test_many_small_gains_add_up():
    values = [1 - 0.01 * i for i in range(40)]
    assert checked(values, patience=4, min_delta=0.035)[0] is None
    stopped_at, stop = checked(values, patience=3, min_delta=0.035)
    assert stopped_at == 4 and stop.best_check == 4  # the best there was, by whatever margin
    stopped_at, stop = checked(values, patience=2, min_delta=0.9, min_delta_mode="rel")
    assert stopped_at == 3


def test_after_a_stop_a_call_changes_nothing():
    stopped_at, stop = checked([1, 2, 2])
    assert stopped_at == 3
    before = stop.state_dict()
    assert stop(0.0) and stop(NAN)
    assert stop.state_dict() == before


def test_a_check_that_may_not_stop_counts():
    stop = EarlyStopping(net(), 2)
    assert not any(stop(v, may_stop=False) for v in (1.0, 2.0, NAN, 2.0))
    assert stop.reason is None and stop.wait == 3
    other = copy.deepcopy(stop)
    assert stop(2.0) and stop.reason is StopReason.PATIENCE
    assert not other(0.5)  # what was held off is not kept


@pytest.mark.parametrize("number", [2, 2.5, torch.tensor(2.5), torch.tensor(2, dtype=torch.int8)])
def test_values(number):
    stop = EarlyStopping(net(), 1)
    stop(number)
    assert stop.best == float(number) and type(stop.best) is float
    weight = torch.ones((), requires_grad=True)
    stop(weight * 0.5)
    assert stop.best == 0.5
    before = stop.state_dict()
    for value in ("low", None, torch.ones(2), torch.ones((), dtype=torch.complex64)):
        with pytest.raises(TypeError, match="EarlyStopping: value must be a number, got "):
            stop(value)
    assert stop.state_dict() == before


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"patience": -1}, ValueError, "patience must be at least 0, got -1"),
        ({"patience": 1.5}, TypeError, "patience must be an integer, got float"),
        ({"min_delta": -0.1}, ValueError, "min_delta must be at least 0, got -0.1"),
        ({"min_delta": NAN}, ValueError, "min_delta must be at least 0, got nan"),
        ({"min_delta_mode": "both"}, ValueError, "min_delta_mode must be abs or rel, got 'both'"),
        ({"mode": "auto"}, ValueError, "mode must be min or max, got 'auto'"),
        ({"start_from": -1}, ValueError, "start_from must be at least 0, got -1"),
        ({"stopping_threshold": NAN}, ValueError, "stopping_threshold must be a number or None"),
        ({"divergence_threshold": "x"}, TypeError, "divergence_threshold must be a number"),
        ({"model": torch.sum}, TypeError, "model must be a torch.nn.Module, got "),
        ({"model": nn.LazyLinear(3)}, ValueError, "model must be initialised: call it once"),
        (
            {"optimizer": torch.optim.SGD(net().parameters())},
            ValueError,
            "optimizer must be one that keeps averages, got one without ema_decay",
        ),
    ],
)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=f"^EarlyStopping: {message}"):
        EarlyStopping(**{"model": net(), "patience": 3} | options)(1.0)


# What is in the model afterwards


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_leaving_restores_however_it_ends(error):
    model = net()
    with (
        pytest.raises(error) if error else pytest.MonkeyPatch.context(),
        EarlyStopping(model, 5) as stop,
    ):
        assert run(stop, [3, 1, 2]) is None
        mark(model, 50)
        if error:
            raise error
    assert marked(model) == 2 and model[1].num_batches_tracked.dtype == torch.int64
    # Training goes on from there: parameters are those that the optimizer has, and require grad.
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_nothing_is_restored_where_nothing_is_kept():
    for options in ({"restore_best": False}, {"start_from": 9}):
        model = net()
        with EarlyStopping(model, 2, **options) as stop:
            run(stop, [1, 2, 3])
        assert marked(model) == 3 and not stop.state_dict()["weights"]
    with pytest.raises(RuntimeError, match="restore_best must be True"):
        EarlyStopping(model, 2, restore_best=False).restore()


class Odd(nn.Module):
    """Tied parameters, buffers that are None or not saved, a shared layer, odd layouts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.again = self.head
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)
        self.short = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.register_parameter("none", None)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_odd_models():
    model = Odd()
    with EarlyStopping(model, 2) as stop:
        run(stop, [3, 1])
        model.scratch = torch.ones(7)  # not of the state_dict: may become what it wants
        run(stop, [3])
    assert marked(model) == 2 and (model.scratch == 1).all()
    assert model.head.weight is model.embedding.weight
    assert len(stop.state_dict()["weights"]) == 8
    kept = stop.state_dict()["weights"]["conv.weight"]
    assert kept.is_contiguous(memory_format=torch.channels_last) and not kept.requires_grad


def test_another_model_is_refused():
    model = net()
    stop = EarlyStopping(model, 5)
    run(stop, [3])
    before = stop.state_dict()
    fine, layer = model[2].weight, model[2]
    for change, got in (
        (
            lambda: setattr(layer, "weight", nn.Parameter(torch.ones(2, 5))),
            r"\(2, 5\) for 2.weight",
        ),
        (lambda: setattr(layer, "weight", None), "none of the name 2.weight"),
        (lambda: setattr(layer, "scale", nn.Parameter(torch.ones(1))), "one more, 2.scale"),
    ):
        change()
        for call in (lambda: stop(1.0), stop.restore):
            message = "model must have the tensors that it had at the first check, got "
            with pytest.raises(RuntimeError, match=message + got):
                call()
        layer.weight = fine
        assert stop.state_dict() == before
    del layer.scale
    layer.weight = nn.Parameter(fine.detach().clone())  # of that name and shape: it is the model's
    assert run(stop, [1]) is None
    mark(model, 9)
    stop.restore()
    assert marked(model) == 2


def test_a_model_that_is_moved():
    model = net()
    stop = EarlyStopping(model, 9)
    run(stop, [3, 1])
    model.double()
    stop.restore()  # what was kept before
    assert marked(model) == 2 and model[0].weight.dtype == torch.float64
    run(stop, [0])
    mark(model, 9)
    stop.restore()
    assert marked(model) == 3
    assert stop.state_dict()["weights"]["0.weight"].dtype == torch.float64


def test_in_inference_mode():
    model = net()
    with EarlyStopping(model, 5) as stop:
        for value in (3.0, 2.0, 4.0, 1.0):
            mark(model, value)
            with torch.inference_mode():
                stop(torch.tensor(value) * 1)
    assert marked(model) == 1
    model(torch.ones(2, 3)).sum().backward()


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/x", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_models_have_the_names_of_the_plain_one(one_rank):
    plain = EarlyStopping(net(), 5)
    run(plain, [1])
    parallel = nn.parallel.DistributedDataParallel(net())
    for wrapped in (parallel, torch.compile(parallel), torch.compile(net(), backend="eager")):
        stop = EarlyStopping(wrapped, 5)
        stop.load_state_dict(plain.state_dict())
        mark(wrapped, 9)
        stop.restore()
        assert marked(wrapped) == 1


def test_sharded_models(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))
    with EarlyStopping(model, 5) as stop:
        run(stop, [3, 1, 2])
    assert all((x.to_local() == 2).all() for x in model.parameters())
    assert all((x == 2).all() for x in model.buffers())


def test_an_interrupted_copy_is_finished(monkeypatch):
    copied, calls = torch._foreach_copy_, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        copied(*args)

    model = net()
    with pytest.raises(KeyboardInterrupt), EarlyStopping(model, 5) as stop:
        run(stop, [3])
        monkeypatch.setattr(_weights.torch, "_foreach_copy_", interrupted)
        run(stop, [1])
    assert marked(model) == 2  # and not of two checks


# The optimizer's averages


@pytest.mark.parametrize("inside", [True, False])
def test_averages_are_kept_and_restored(inside):
    model = net().bfloat16()
    model[2].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.SGD(trained, lr=0.5, ema_decay=0.5)
    expected = {}
    with EarlyStopping(model, 9, optimizer=optimizer) as stop:
        stop(9.0)  # before the first step: averages start where the weights are
        for value in (3.0, 1.0, 2.0):
            for p in trained:
                p.grad = torch.randn_like(p)
            optimizer.step()
            with torch.no_grad():
                model[2].bias.add_(1)
                model[1].running_mean.add_(1)
            if inside:
                with optimizer.ema_weights():
                    stop(value)
                    with pytest.raises(RuntimeError, match="averaged weights are swapped in"):
                        stop.restore()
            else:
                stop(value)
            if value == 1.0:
                with optimizer.ema_weights():
                    expected = copy.deepcopy(model.state_dict())
    for name, x in model.state_dict().items():
        assert torch.equal(x, expected[name]), name


def test_a_parameter_that_is_averaged_no_more_is_refused():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.5, ema_decay=0.5)
    optimizer.step()
    stop = EarlyStopping(model, 9, optimizer=optimizer)
    stop(1.0)
    model[0].weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match=r"the optimizer averages, got another 0\.weight"):
        stop(0.5)


# Values that are not waited for


def test_a_late_value_is_looked_at_by_the_next_call(late):
    values = [3, 1, 2, 2, 2, 2]
    stopped_at, stop = checked(values)
    assert stopped_at == 5  # at once it would be 4, of which this is the answer
    assert (stop.checks, stop.best_check, stop.reason) == (4, 2, StopReason.PATIENCE)
    stop.restore()
    assert marked(stop.model) == 2  # those of the check, whatever training did since
    assert late.waiting == 0


def test_whoever_asks_waits(late):
    for ask in ("stopped", "reason", "best", "best_check", "wait", "state_dict", "restore"):
        stop = EarlyStopping(net(), 1)
        mark(stop.model, 7)
        assert not stop(2.0) and late.waiting == 1
        mark(stop.model, 8)
        found = getattr(stop, ask)
        if callable(found):
            found()
        assert late.waiting == 0 and stop.best == 2.0
        assert stop.checks == 1
    assert marked(stop.model) == 7
    assert not stop(3.0) and stop.stopped  # asked, it is known at the same check
    stop = EarlyStopping(net(), 1, sync=True)
    assert not stop(2.0) and stop(3.0) and late.waiting == 0


@pytest.mark.parametrize("values", [[3, 2, 1, 5, 4, 0.5, 7, 8, 9], [1, 2, 0.5], [NAN], [3, NAN, 1]])
def test_late_or_not_the_state_is_the_same(values, late, monkeypatch):
    found, stop = checked(values)
    stop.restore()
    monkeypatch.undo()
    expected, other = checked(values)
    other.restore()
    assert found in (None, expected, (expected or 0) + 1)
    assert marked(stop.model) == marked(other.model)
    one, two = stop.state_dict(), other.state_dict()
    del one["weights"], two["weights"]
    assert one == two


# Saving and loading


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("is_late", [False, True])
def test_a_resumed_run_stops_at_the_same_check(at, is_late, request):
    if is_late:
        request.getfixturevalue("late")
    values = [5, 4.5, 3, 3.1, NAN, 2.9, 3, 2.95, 1]
    make = partial(EarlyStopping, patience=4, min_delta=0.3, check_finite=False)
    whole = make(net())
    assert run(whole, values) == 7 + is_late
    first = make(net())
    run(first, values[:at])
    file = io.BytesIO()
    torch.save({"stop": first.state_dict(), "model": first.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make(net())
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["stop"])
    mark(second.model, 77)
    assert second.stopped is first.stopped
    stopped_at = run(second, values[first.checks :])
    assert stopped_at in (7, 8) and second.checks == 7
    for stop in (whole, second):
        stop.restore()
    assert marked(second.model) == marked(whole.model) == 6
    one, two = second.state_dict(), whole.state_dict()
    for name, x in one.pop("weights").items():
        assert torch.equal(x, two["weights"][name]) and x.dtype == two["weights"][name].dtype
    del two["weights"]
    assert one == two
    assert [type(one[name]) for name in one] == [type(two[name]) for name in two]


def test_what_is_loaded_is_a_copy_and_bad_state_changes_nothing():
    _, stop = checked([3, 1])
    saved = copy.deepcopy(stop.state_dict())
    other = EarlyStopping(net(), 9)  # options stay
    other.load_state_dict(saved)
    saved["weights"]["0.weight"].zero_()
    other.restore()
    assert marked(other.model) == 2 and other.patience == 9
    before = other.state_dict()
    for key, value, kind in (
        ("reason", "boredom", ValueError),
        ("weights", {}, ValueError),
        ("weights", saved["weights"] | {"0.weight": torch.ones(7)}, ValueError),
        ("wait", None, KeyError),
    ):
        state = saved | {key: value}
        if value is None:
            del state[key]
        with pytest.raises(kind):
            other.load_state_dict(state)
        assert other.state_dict() == before
    EarlyStopping(net(), 9, restore_best=False).load_state_dict(saved | {"weights": {}})


# Ranks

RANKS = """
    import sys, torch
    from torch import distributed as dist, nn
    from reg_kernels.training import EarlyStopping

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", "file://" + sys.argv[2], rank=rank, world_size=2)
    try:
        alone = [dist.new_group([i]) for i in range(2)][rank]

        def run(values, **options):
            stop = EarlyStopping(nn.Linear(1, 1), 2, **options)
            stopped = next((i for i, v in enumerate(values, 1) if stop(v)), None)
            return [stopped, stop.best, stop.best_check, stop.reason and stop.reason.value]

        # By itself the first rank would stop at 3 and the second not at all.
        own = [[1, 2, 3, 4, 5, 6], [9, 7, 5, 4, 3.5, 3]][rank]
        print(run(own))
        print(run([torch.tensor(v, dtype=torch.bfloat16) for v in own]))
        print(run([[3, 2, 1], [3, float("nan"), 1]][rank]))
        print(run([1e308, 1.1e308, 1.2e308]))  # equal ones are taken as they are
        print(run(own, process_group=alone)[0])
    finally:
        dist.destroy_process_group()
"""


def test_ranks_agree(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    command = [sys.executable, "-c", textwrap.dedent(RANKS)]
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(run_program, [*command, r, tmp_path / "x"]) for r in range(2)]
        done = [rank.result() for rank in ranks]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (d.stdout.splitlines() for d in done)
    mean = "[5, 4.0, 3, 'patience']"
    assert first[:4] == [mean, mean, "[2, 3.0, 1, 'not_finite']", "[3, 1e+308, 1, 'patience']"]
    assert second[:4] == first[:4]
    assert [first[4], second[4]] == ["3", "None"]
