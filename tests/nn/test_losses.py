"""The loss layers: CrossEntropyLoss beside torch's, and distillation."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as TF

import reg_kernels
from reg_kernels import functional as F
from reg_kernels import nn
from reg_kernels.augment import MixedTarget

from support import DEVICE, DTYPE_IDS, DTYPES, implementations

on_each = pytest.mark.parametrize("backend", implementations())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
C = 7
WEIGHT = torch.linspace(0.2, 1.5, C, device=DEVICE)
OPTIONS = [
    {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": s}
    for weight, ignore_index, reduction, s in itertools.product(
        (None, WEIGHT), (-100, 2), ("mean", "sum", "none"), (0.0, 0.1)
    )
]
COPIERS = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


def ids(options):
    return "-".join(
        f"{k}={'given' if k == 'weight' else v}" for k, v in options.items() if v is not None
    )


options_ids = pytest.mark.parametrize("options", OPTIONS, ids=ids)


def logits(*shape, dtype=torch.float64, **options):
    return (
        torch.randn(*shape, device=DEVICE, dtype=torch.float64).to(dtype).requires_grad_(**options)
    )


def indices(*shape):
    return torch.randint(C, shape, device=DEVICE)


def of_dtype(options, dtype):
    return options | (
        {"weight": options["weight"].to(dtype)} if options["weight"] is not None else {}
    )


def assert_same_loss(ours, theirs, input, *target):
    """Loss and gradient of both, of an input of float64."""
    results = []
    for loss in (ours, theirs):
        x = input.detach().requires_grad_()
        value = loss(x, *target)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        results.append((value.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# CrossEntropyLoss beside torch's


@on_each
@options_ids
@pytest.mark.parametrize("shape", [(5, C), (C,), (2, C, 3), (2, C, 2, 3)], ids=str)
def test_it_is_torchs_of_class_indices(backend, options, shape):
    options = of_dtype(options, torch.float64)
    ours = nn.CrossEntropyLoss(**options, backend=backend)
    theirs = torch.nn.CrossEntropyLoss(**options)
    target = indices(*(shape[:1] if len(shape) > 1 else ()), *shape[2:])
    if target.dim():
        target.view(-1)[0] = 2
    assert_same_loss(ours, theirs, logits(*shape), target)


@on_each
@pytest.mark.parametrize("options", [o for o in OPTIONS if o["ignore_index"] < 0], ids=ids)
def test_it_is_torchs_of_class_probabilities(backend, options):
    options = of_dtype(options, torch.float64)
    ours = nn.CrossEntropyLoss(**options, backend=backend)
    target = torch.rand(4, C, 3, device=DEVICE, dtype=torch.float64).softmax(1)
    assert_same_loss(ours, torch.nn.CrossEntropyLoss(**options), logits(4, C, 3), target)


@on_each
@options_ids
def test_a_mixed_target_is_two_losses_of_torchs(backend, options):
    options = of_dtype(options, torch.float64)
    ours = nn.CrossEntropyLoss(**options, backend=backend)
    theirs = torch.nn.CrossEntropyLoss(**options)
    a, b = indices(6, 3), indices(6, 3)
    x = logits(6, C, 3)
    assert_same_loss(
        ours, lambda x, t: 0.3 * theirs(x, a) + 0.7 * theirs(x, b), x, MixedTarget(a, b, 0.3)
    )
    if options["reduction"] == "none":
        lam = torch.rand(6, device=DEVICE, dtype=torch.float64)
        each = lam.view(-1, 1)
        assert_same_loss(
            ours,
            lambda x, t: each * theirs(x, a) + (1 - each) * theirs(x, b),
            *(x, MixedTarget(a, b, lam)),
        )


@on_each
def test_the_targets_smoothing(backend):
    a, b = indices(6), indices(6)
    x, target = logits(6, C), MixedTarget(a, b, torch.rand(6, device=DEVICE), 0.2)
    dense = target.to_dense(C, torch.float64)
    theirs = torch.nn.CrossEntropyLoss()
    assert_same_loss(nn.CrossEntropyLoss(backend=backend), lambda x, t: theirs(x, dense), x, target)
    assert_same_loss(
        *(nn.CrossEntropyLoss(label_smoothing=0.2, backend=backend), lambda x, t: theirs(x, dense)),
        *(x, target),
    )
    with pytest.raises(ValueError, match="label_smoothing must be given once"):
        nn.CrossEntropyLoss(label_smoothing=0.1, backend=backend)(x, target)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1},
        {"size_average": False},
        {"reduce": False},
        {"weight": WEIGHT},
    ],
    ids=ids,
)
def test_constructor_repr_and_state_are_torchs(arguments):
    ours, theirs = nn.CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert ours.reduction == theirs.reduction
    assert (
        list(ours.state_dict())
        == list(theirs.state_dict())
        == list(arguments)[:1] * ("weight" in arguments)
    )
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    positional = nn.CrossEntropyLoss(WEIGHT, None, 3, None, "sum", 0.1)
    assert (positional.ignore_index, positional.reduction, positional.label_smoothing) == (
        3,
        "sum",
        0.1,
    )
    assert positional.weight is WEIGHT


@on_each
@pytest.mark.parametrize(
    ("arguments", "input", "target"),
    [
        ({}, (4, C), indices(3)),
        ({}, (4, C, 2), indices(4, 3)),
        ({}, (4, C), indices(4).int()),
        ({}, (4, C), torch.rand(4, C + 1, device=DEVICE)),
        ({"ignore_index": 2}, (4, C), torch.rand(4, C, device=DEVICE)),
        ({"reduction": "median"}, (4, C), indices(4)),
        ({"label_smoothing": 1.5}, (4, C), indices(4)),
        ({"weight": WEIGHT[:3]}, (4, C), indices(4)),
        pytest.param(
            *({}, (4, C), indices(4) + C),
            marks=pytest.mark.skipif(DEVICE != "cpu", reason="a device-side assertion"),
        ),
    ],
)
def test_what_torchs_refuses_is_refused_by_the_same_type(backend, arguments, input, target):
    x = logits(*input, dtype=torch.float32)
    with pytest.raises(Exception) as theirs:
        torch.nn.CrossEntropyLoss(**arguments)(x, target)
    with pytest.raises(type(theirs.value), match=r"^cross_entropy: ") as ours:
        nn.CrossEntropyLoss(**arguments, backend=backend)(x, target)
    assert type(ours.value) is type(theirs.value)


def test_convert_and_revert():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(3, C)
            self.loss = torch.nn.CrossEntropyLoss(torch.linspace(0, 1, C), reduction="sum")

    model = Model()
    reports = []
    converted = reg_kernels.convert(model, backend="reference", report=reports.append)
    assert type(converted.loss) is nn.CrossEntropyLoss
    assert converted.loss.backend == "reference"
    assert ("loss", "torch.nn.CrossEntropyLoss", "reg_kernels.nn.CrossEntropyLoss") in reports[
        0
    ].swapped
    assert list(converted.state_dict()) == list(model.state_dict())
    x, target = torch.randn(4, C), torch.randint(C, (4,))
    torch.testing.assert_close(converted.loss(x, target), model.loss(x, target))
    back = reg_kernels.revert(converted)
    assert type(back.loss) is torch.nn.CrossEntropyLoss
    assert "backend" not in vars(back.loss)
    assert back.loss(x, target).equal(model.loss(x, target))


# Both


def layer(name, **options):
    return getattr(nn, name)(**options)


def call(loss, x, target, seed=0):
    """The loss; a teacher, where one is needed, is the same for the same seed."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss(x, target)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    teacher = torch.randn(x.shape, generator=generator, device=DEVICE, dtype=torch.float64)
    return loss(x, teacher.to(x.dtype), target)


names = pytest.mark.parametrize("name", ["CrossEntropyLoss", "DistillationLoss"])


@names
@pytest.mark.parametrize("copier", COPIERS)
def test_copies(name, copier):
    loss = layer(name, weight=WEIGHT, reduction="sum", ignore_index=1, backend="reference")
    twin = copier(loss)
    assert type(twin) is type(loss)
    assert repr(twin) == repr(loss)
    assert twin.backend == "reference"
    assert twin.weight.equal(WEIGHT)
    x, target = logits(4, C), indices(4)
    assert call(twin, x, target).equal(call(loss, x, target))


@names
def test_the_weight_is_a_buffer(name):
    loss = layer(name, weight=WEIGHT.cpu())
    assert list(loss.state_dict()) == ["weight"]
    assert not list(loss.parameters())
    assert loss.double().weight.dtype == torch.float64
    assert loss.to("meta").weight.device.type == "meta"
    assert not layer(name).state_dict()


@names
@on_each
def test_the_layer_forces_its_backend(name, backend):
    loss = call(layer(name, backend=backend), logits(4, C), indices(4))
    suffix = "default" if backend == "native" else backend
    op = {"CrossEntropyLoss": "cross_entropy", "DistillationLoss": "distillation"}[name]
    assert loss.grad_fn.call[0] is getattr(getattr(torch.ops.reg_kernels, op), suffix)
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(name, backend="cuda")


@names
@on_each
@pytest.mark.parametrize("mixed", [False, True])
def test_compiled_whole(name, backend, mixed):
    torch.compiler.reset()
    loss = layer(name, weight=WEIGHT, backend=backend)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for samples in (4, 6):
        x, teacher = (
            logits(samples, C, dtype=torch.float32),
            logits(samples, C, dtype=torch.float32),
        )
        target = indices(samples)
        if mixed:
            lam = torch.rand(samples, device=DEVICE)
            target = MixedTarget(target, target.flip(0), lam, 0.1)
        inputs = (x, target) if name == "CrossEntropyLoss" else (x, teacher.detach(), target)
        values = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values))


@names
@on_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(name, backend, dtype):
    loss = layer(name, backend=backend)
    body = torch.nn.Linear(5, C, device=DEVICE)
    x, target = torch.randn(4, 5, device=DEVICE), indices(4)
    with torch.autocast(DEVICE, dtype):
        scores = body(x)
        value = call(loss, scores, target)
    assert scores.dtype == dtype
    assert value.dtype == torch.float32
    value.backward()
    assert body.weight.grad.isfinite().all()
    torch.testing.assert_close(value, call(loss, scores.float(), target), rtol=1e-2, atol=1e-2)


@names
@on_each
@dtypes
def test_the_result_is_of_the_inputs_type(name, backend, dtype):
    value = call(layer(name, backend=backend), logits(4, C, dtype=dtype), indices(4))
    assert value.dtype == dtype
    assert value.shape == ()


# DistillationLoss


def distilled(x, teacher, target, weight, t, alpha, ignore_index, reduction, smoothing):
    """The loss by torch's functions."""
    log_q, log_p = (each.div(t).log_softmax(1) for each in (x, teacher))
    divergence = TF.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    divergence = {"mean": divergence.mean, "sum": divergence.sum, "none": divergence.clone}[
        reduction
    ]()
    labels = TF.cross_entropy(
        *(x, target, weight),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    return alpha * t * t * divergence + (1 - alpha) * labels


@on_each
@options_ids
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (4.0, 0.9), (0.5, 1.0)])
def test_distillation_is_its_parts(backend, options, temperature, alpha):
    options = of_dtype(options, torch.float64)
    loss = nn.DistillationLoss(temperature, alpha, **options, backend=backend)
    teacher, target = logits(5, C, 3).detach(), indices(5, 3)
    target[0, 0] = 2
    weight, ignore_index, reduction, smoothing = options.values()
    rest = (weight, temperature, alpha, ignore_index, reduction, smoothing)
    assert_same_loss(
        loss, lambda x, t, y: distilled(x, t, y, *rest), logits(5, C, 3), teacher, target
    )


def test_distillations_arguments():
    loss = nn.DistillationLoss(3.0, 0.25, WEIGHT, 1, "sum", 0.1)
    assert repr(loss) == (
        "DistillationLoss(temperature=3.0, alpha=0.25, reduction='sum', ignore_index=1, "
        "label_smoothing=0.1)"
    )
    assert loss.weight is WEIGHT
    x, teacher, target = (
        logits(4, C, dtype=torch.float32),
        torch.randn(4, C, device=DEVICE),
        indices(4),
    )
    options = {"temperature": 3.0, "alpha": 0.25, "ignore_index": 1, "reduction": "sum"}
    with reg_kernels.backend("reference"):
        expected = F.distillation_loss(x, teacher, target, WEIGHT, **options, label_smoothing=0.1)
        assert loss(x, teacher, target).equal(expected)
        assert nn.DistillationLoss()(x, teacher, target).equal(
            F.distillation_loss(x, teacher, target)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, r"alpha must be in \[0, 1\], got nan"),
        ({"reduction": "batchmean"}, "reduction must be 'none', 'mean' or 'sum', got 'batchmean'"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\], got -0.1"),
    ],
)
def test_distillations_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^DistillationLoss: {message}$"):
        nn.DistillationLoss(**options)
