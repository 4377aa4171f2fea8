"""torch.compile in its modes: no graph break, no recompile beyond two programs, and its caches."""

import sys
import textwrap

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import reg_kernels
from reg_kernels import functional

from support import run_program


@pytest.fixture(autouse=True)
def _dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 32)
        self.bn, self.bn2 = nn.BatchNorm1d(32), nn.BatchNorm1d(32)
        self.drop, self.path = nn.Dropout(0.2), reg_kernels.nn.DropPath(0.1)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = self.drop(torch.relu(self.bn(self.first(x))))
        return self.last(x + self.path(torch.relu(self.bn2(self.second(x)))))


def batch(count):
    return torch.randn(count, 16), torch.randint(4, (count,))


@pytest.mark.parametrize(
    ("fuse", "options"),
    [
        (False, {"backend": "aot_eager"}),
        *((True, {"mode": mode}) for mode in ("default", "reduce-overhead", "max-autotune")),
    ],
    ids=lambda x: next(iter(x.values())) if isinstance(x, dict) else "",
)
def test_a_training_is_three_programs(fuse, options):
    model = reg_kernels.convert(Net(), fuse=fuse)
    optimizer = reg_kernels.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    compiled = torch.compile(model, fullgraph=True, **options)
    loss_of = reg_kernels.nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(x, y):
        loss = loss_of(compiled(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for count in (8, 8, 9):  # of one size, and of any
        step(*batch(count))
    assert counters["stats"]["unique_graphs"] == 2
    model.eval()
    with torch.no_grad():
        compiled(batch(8)[0])
    model.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (10, 8, 12):
            step(*batch(count))
        x = batch(11)[0]
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("convert", [lambda net: net, reg_kernels.convert])
def test_an_evaluation_before_a_batch_of_another_size_makes_two(convert):
    model = convert(Net())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training, count in ((True, 8), (False, 8), (False, 9), (True, 9), (False, 10), (True, 10)):
        compiled.train(training)(batch(count)[0])
    assert counters["stats"]["unique_graphs"] == 4


def test_a_step_breaks_the_graph_where_it_steps():
    """Beside torch's own breaks, at backward and zero_grad."""
    model = reg_kernels.convert(Net(), fuse=True)
    optimizer = reg_kernels.optim.AdamW(model.parameters(), lr=1e-3)

    @torch.compile(backend="aot_eager")
    def step(x, y):
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    for count in (8, 9, 10):
        step(*batch(count))
    reasons = [reason for reason in counters["graph_break"] if "FusedOptimizer.step" not in reason]
    assert len(reasons) < len(counters["graph_break"])
    assert all("backward()" in reason or "zero_grad" in reason for reason in reasons), reasons


PROGRAM = """
    import sys
    from pathlib import Path
    import torch, reg_kernels
    from torch import nn
    from torch._dynamo.utils import counters

    what, artifacts = sys.argv[1], Path("artifacts")
    if what == "load":
        assert torch.compiler.load_cache_artifacts(artifacts.read_bytes()) is not None
    torch.manual_seed(0)
    layers = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
    model = reg_kernels.convert(nn.Sequential(*layers), fuse=True)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(8, 16)
    with torch.no_grad():
        values = [compiled(x), compiled.eval()(x), model[1].running_mean]
    if what == "save":
        artifacts.write_bytes(torch.compiler.save_cache_artifacts()[0])
        torch.save(values, "values")
    else:
        assert all(map(torch.equal, values, torch.load("values")))
    kinds = "inductor", "fxgraph_cache", "aot_autograd", "autograd_cache"
    for kind, cache in zip(kinds[::2], kinds[1::2]):
        print(kind, counters[kind][f"{cache}_hit"], counters[kind][f"{cache}_miss"])
"""


def test_cache_artifacts_serve_another_process(tmp_path, monkeypatch):
    # They take longer to compile than what would include them.
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    for what, hits, misses in (("save", 0, 2), ("load", 2, 0)):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / what))
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), what]
        done = run_program(command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        # Where both hit, inductor's own is not asked.
        found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        assert found["aot_autograd"] == f"{hits} {misses}", done.stdout
        assert found["inductor"].endswith(f" {misses}"), done.stdout


@pytest.mark.parametrize("backend", reg_kernels.backends.NAMES)
def test_negated_views_need_no_operation_of_a_program(backend):
    """The dispatcher negates what an op is given. Inductor has it wrong of all ops."""
    if (why := reg_kernels.backends.why_not(backend, "cpu", torch.float32)) is not None:
        pytest.skip(why)
    state, partner = torch.tensor([1, 2]), torch.tensor([1, 2, 0])
    options = {"backend": backend}

    def function(x):
        y = torch._neg_view(x.clone())
        functional.mixup(y, 0.3, partner, inplace=True, **options)
        dropped = functional.dropout2d(y, 0.5, rng_state=state, **options)
        return dropped, functional.batch_norm_act(torch._neg_view(y), None, None, training=True)

    x = torch._neg_view(torch.randn(3, 4, 5, 5))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x), function(x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)
