"""Cross-entropy: torch's values, gradients, errors; mixed targets, registration, compilation."""

import contextlib
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as TF
from loss_inputs import (
    IGNORED,
    LAYOUTS,
    check_same,
    chosen,
    compiling,
    draw,
    is_interpreted,
    labels_of,
)

from reg_kernels import backends
from reg_kernels import functional as F
from reg_kernels._mixed_target import MixedTarget
from reg_kernels.ops._registry import OPS

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas

IMPLEMENTATIONS = implementations()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's kernels assert values by themselves")
REDUCTIONS = ("none", "mean", "sum")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


pytestmark = pytest.mark.usefixtures("one_thread")


SHAPES = [(5,), (1,), (4, 7), (3, 1), (3, 5, 6), (2, 3, 4, 5), (2, 3, 2, 2, 3)]
LARGE = [(37, 1003), (300, 10), (3, 19, 33, 21), (2, 301, 17), (5, 2, 100)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@on_each
def test_class_indices(shape, layout, backend):
    if is_interpreted(backend) and shape in LARGE:
        pytest.skip("too large for Triton's interpreter")
    x = LAYOUTS[layout](draw(*shape)).detach().requires_grad_()
    classes = shape[min(1, len(shape) - 1)]
    weight = torch.rand(classes, dtype=x.dtype, device=DEVICE)
    all_options = chosen(backend, layout, (None, weight), (IGNORED, 1), REDUCTIONS, (0.0, 0.1, 1.0))
    for weight, ignored, reduction, smoothing in all_options:
        labels = labels_of(x, ignored)
        options = {
            "weight": weight,
            "ignore_index": ignored,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        y = F.cross_entropy(x, labels, **options, backend=backend)
        if len(shape) == 1 and int(labels) == ignored and smoothing and reduction == "mean":
            continue  # torch: NaN as well, but by way of another division
        check_same(y, TF.cross_entropy(x, labels, **options), [x])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES + LARGE[2:4], ids=str)
@on_each
def test_class_probabilities(shape, layout, backend):
    if is_interpreted(backend) and shape in LARGE:
        pytest.skip("too large for Triton's interpreter")
    x = LAYOUTS[layout](draw(*shape)).detach().requires_grad_()
    classes = shape[min(1, len(shape) - 1)]
    weight = torch.rand(classes, dtype=x.dtype, device=DEVICE)
    for of_targets in ("contiguous", "channels_last"):
        target = LAYOUTS[of_targets](draw(*shape).softmax(min(1, len(shape) - 1)))
        for with_grad, w, reduction, smoothing in chosen(
            backend, layout, (False, True), (None, weight), REDUCTIONS, (0.0, 0.1, 1.0)
        ):
            target = target.detach().requires_grad_(with_grad)
            options = {"weight": w, "reduction": reduction, "label_smoothing": smoothing}
            y = F.cross_entropy(x, target, **options, backend=backend)
            leaves = [x, target] if with_grad else [x]
            check_same(y, TF.cross_entropy(x, target, **options), leaves)


@on_each
def test_bytes_as_labels_and_legacy_options(backend):
    x = draw(4, 7).requires_grad_()
    labels = torch.tensor([0, 6, 255, 3], dtype=torch.uint8, device=DEVICE)
    for reduction in REDUCTIONS:
        options = {"ignore_index": 255, "reduction": reduction}
        y = F.cross_entropy(x, labels, **options, backend=backend)
        check_same(y, TF.cross_entropy(x, labels, **options), [x])
    labels = labels.long() % 7
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        options = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
        legacy = size_average is not None or reduce is not None
        warned = pytest.warns(UserWarning, match="size_average and reduce")
        with warned if legacy else contextlib.nullcontext():
            y = F.cross_entropy(x, labels, **options, backend=backend)
        with warned if legacy else contextlib.nullcontext():
            z = TF.cross_entropy(x, labels, **options)
        check_same(y, z, [x])


@on_each
def test_logits_without_a_batch(backend):
    x = draw(5).requires_grad_()
    label = torch.tensor(2, device=DEVICE)
    for reduction in REDUCTIONS:
        y = F.cross_entropy(x, label, reduction=reduction, backend=backend)
        z = TF.cross_entropy(x, label, reduction=reduction)
        check_same(y, z, [x])
        # torch takes this as well, but has no gradient of it.
        y = F.cross_entropy(x, label.view(1), reduction=reduction, backend=backend)
        check_same(y, z, [x])


# Mixed targets


def mixed_by_torch(x, a, b, lam, reduction, **options):
    """lam CE(a) + (1 - lam) CE(b), each reduced as torch reduces one."""
    lam = torch.as_tensor(lam, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 2))
    total = 0
    for labels, share in ((a, lam), (b, 1 - lam)):
        loss = share * TF.cross_entropy(x, labels, reduction="none", **options)
        if reduction == "mean":
            weight = options["weight"]
            weight = x.new_ones(x.shape[1]) if weight is None else weight
            counted = labels != options["ignore_index"]
            loss = loss / weight[labels[counted]].sum()
        total = total + loss
    return total if reduction == "none" else total.sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 6), (2, 3, 4, 5), *LARGE], ids=str)
@on_each
def test_mixed_targets(shape, layout, backend):
    if is_interpreted(backend) and shape in LARGE:
        pytest.skip("too large for Triton's interpreter")
    x = LAYOUTS[layout](draw(*shape)).detach().requires_grad_()
    weight = torch.rand(shape[1], dtype=x.dtype, device=DEVICE)
    each = torch.rand(shape[0], dtype=x.dtype, device=DEVICE)
    each[0] = 1.0
    for lam, w, ignored, reduction, smoothing in chosen(
        backend, layout, (0.3, each), (None, weight), (IGNORED, 1), REDUCTIONS, (0.0, 0.1, 1.0)
    ):
        a, b = labels_of(x, ignored), labels_of(x, ignored)
        options = {"weight": w, "ignore_index": ignored}
        target = MixedTarget(a, b, lam, smoothing)
        y = F.cross_entropy(x, target, reduction=reduction, **options, backend=backend)
        options["label_smoothing"] = smoothing
        z = mixed_by_torch(x, a, b, lam, reduction, **options)
        check_same(y, z, [x])
        if lam is not each:  # that is, torch's own losses
            z = lam * TF.cross_entropy(x, a, reduction=reduction, **options)
            z = z + (1 - lam) * TF.cross_entropy(x, b, reduction=reduction, **options)
            check_same(y, z, [x])


@on_each
def test_lambdas_of_each_kind(backend):
    x = draw(3, 4).requires_grad_()
    a, b = labels_of(x), labels_of(x)
    for lam in (0, 1, 0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25] * 3)):
        for dtype in DTYPES if isinstance(lam, torch.Tensor) else [None]:
            lam = lam if dtype is None else lam.to(dtype).to(DEVICE)
            y = F.cross_entropy(x, MixedTarget(a, b, lam), backend=backend)
            share = float(torch.as_tensor(lam).flatten()[0])
            z = share * TF.cross_entropy(x, a) + (1 - share) * TF.cross_entropy(x, b)
            check_same(y, z, [x])
    one = draw(5).requires_grad_()
    target = MixedTarget(torch.tensor(1, device=DEVICE), torch.tensor(3, device=DEVICE), 0.3)
    z = 0.3 * TF.cross_entropy(one, target.labels) + 0.7 * TF.cross_entropy(
        one, target.partner_labels
    )
    check_same(F.cross_entropy(one, target, backend=backend), z, [one])


@on_each
def test_smoothing_of_the_target_or_of_the_loss(backend):
    x = draw(3, 4).requires_grad_()
    target = MixedTarget(labels_of(x), labels_of(x), 0.3)
    y = F.cross_entropy(x, target, label_smoothing=0.1, backend=backend)
    for smoothing in (0.0, 0.1):
        smoothed = target._replace(label_smoothing=0.1)
        z = F.cross_entropy(x, smoothed, label_smoothing=smoothing, backend=backend)
        torch.testing.assert_close(y, z, rtol=0, atol=0)
    dense = TF.cross_entropy(x, smoothed.to_dense(4, x.dtype))
    torch.testing.assert_close(y, dense)


# Gradients


@on_each
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities", "mixed"])
def test_gradient_by_each_way_through_the_graph(kind, reduction, backend):
    x, other = draw(3, 4, 2).requires_grad_(), draw(3, 2)
    a, b = labels_of(x, 1), labels_of(x, 1)
    target = {
        "indices": a,
        "probabilities": draw(3, 4, 2).softmax(1),
        "mixed": MixedTarget(a, b, torch.tensor([0.0, 0.3, 1.0], dtype=x.dtype, device=DEVICE)),
    }[kind]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    if kind != "probabilities":
        options["ignore_index"] = 1

    def truth(x):
        if kind == "mixed":
            return mixed_by_torch(x, a, b, target.lam, weight=None, **options)
        return TF.cross_entropy(x, target, **options)

    def function(x):
        return F.cross_entropy(x, target, **options, backend=backend)

    g = other if reduction == "none" else torch.tensor(-0.7, dtype=x.dtype, device=DEVICE)
    y, z = function(x), truth(x)
    (expected,) = torch.autograd.grad(z, x, g, retain_graph=True)
    gradients = [torch.autograd.grad(y, x, s * g, retain_graph=True)[0] for s in (1, 3, 1)]
    for gradient, scale in zip(gradients, (1, 3, 1), strict=True):
        torch.testing.assert_close(gradient, scale * expected, **CLOSE)
    # The first gradient was given away: what a caller does to it is not seen by the next.
    gradients[0].zero_()
    (again,) = torch.autograd.grad(y, x, g, create_graph=True)
    torch.testing.assert_close(again, expected, **CLOSE)
    assert again.requires_grad
    for order in (True, False):  # the gradient kept in the forward, with and without a graph
        y = function(x)
        (gradient,) = torch.autograd.grad(y, x, g, create_graph=order)
        torch.testing.assert_close(gradient, expected, **CLOSE)
    # Through an expanded gradient, and accumulated into .grad.
    x.grad = None
    for _ in range(2):
        (function(x).sum() * 2).backward()
    (expected,) = torch.autograd.grad(4 * truth(x).sum(), x)
    torch.testing.assert_close(x.grad, expected, **CLOSE)


@on_each
@pytest.mark.parametrize("reduction", REDUCTIONS)
@dtypes
def test_logits_changed_before_the_backward_raise(dtype, reduction, backend):
    leaf = draw(3, 4, dtype=dtype).requires_grad_()
    x = leaf * 1
    y = F.cross_entropy(x, labels_of(x), reduction=reduction, backend=backend)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert leaf.grad is None


def test_a_freed_graph_raises():
    x = draw(3, 4).requires_grad_()
    y = F.cross_entropy(x, labels_of(x))
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


# Bad input


LABELS = torch.tensor([0, 1, 3])
BAD = {
    "label C": (
        {"target": torch.tensor([0, 4, 1])},
        r"labels must be in \[0, 4\), or ignore_index",
    ),
    "label -1": ({"target": torch.tensor([0, -1, 1])}, r"ignore_index -100, got -1"),
    "label -100": ({"target": torch.tensor([-100, 0, 0]), "ignore_index": 1}, "got -100"),
    "fewer labels": ({"target": LABELS[:2]}, r"target must have shape \(3,\), got \(2,\)"),
    "another batch": (
        {"input": torch.ones(3, 4, 2), "target": torch.zeros(2, 2).long()},
        r"target must have shape \(3, 2\), got \(2, 2\)",
    ),
    "other positions": (
        {"input": torch.ones(3, 4, 2, 2), "target": torch.zeros(3, 2, 3).long()},
        r"target must have shape \(3, 2, 2\)",
    ),
    "no positions": (
        {"input": torch.ones(3, 4, 2)},
        r"target must have shape \(3, 2\), got \(3,\)",
    ),
    "more labels": (
        {"input": torch.ones(4), "target": LABELS},
        r"must have shape \(\), got \(3,\)",
    ),
    "integers like logits": ({"target": torch.zeros(3, 4).long()}, "target must have shape"),
    "floats as labels": ({"target": LABELS.float()}, "target must be int64 class indices"),
    "int32 labels": ({"target": LABELS.int()}, "target must be int64 class indices"),
    "bool labels": ({"target": LABELS.bool()}, "target must be int64 class indices"),
    "list of labels": ({"target": [0, 1, 3]}, "target must be a Tensor or a MixedTarget, got list"),
    "no tensor": ({"input": [1.0]}, "input must be a Tensor, got list"),
    "probabilities of 5": ({"target": torch.rand(3, 5)}, r"must have the input's shape, \(3, 4\)"),
    "probabilities of 2": ({"target": torch.rand(2, 4)}, r"must have the input's shape, \(3, 4\)"),
    "weight of 5": ({"weight": torch.ones(5)}, "weight must have one number for each of the 4"),
    "weight of 4x1": ({"weight": torch.ones(4, 1)}, "weight must have one number for each"),
    "weight and probabilities": (
        {"target": torch.rand(3, 4), "weight": torch.ones(3)},
        "weight must have one number for each of the 4 classes",
    ),
    "smoothing": ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "reduction": ({"reduction": "avg"}, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    "batchmean": ({"reduction": "batchmean"}, "reduction must be 'none', 'mean' or 'sum'"),
    "ignored probabilities": (
        {"target": torch.rand(3, 4), "ignore_index": 1},
        "ignore_index is for class indices",
    ),
    "integers": ({"input": torch.ones(3, 4).long()}, "input must be one of float64, float32"),
    "complex": ({"input": torch.ones(3, 4) * 1j}, "input must be one of .*, got complex64"),
    "no dimensions": ({"input": torch.tensor(1.0), "target": torch.tensor(0)}, "no dimensions"),
    "target elsewhere": ({"target": LABELS.to("meta")}, "target must be on the input's device"),
    "weight elsewhere": ({"weight": torch.ones(4, device="meta")}, "weight must be on the input's"),
}


@on_cpu
@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_raises_torchs_type_and_changes_nothing(mistake):
    change, message = BAD[mistake]
    options = {"input": torch.randn(3, 4), "target": LABELS} | change
    with pytest.raises(Exception) as raised:
        TF.cross_entropy(**options)
    for backend in ("reference", *(["native"] if isas() else [])):
        if isinstance(options["input"], torch.Tensor) and options["input"].is_floating_point():
            options["input"] = options["input"].detach().requires_grad_()
        with pytest.raises(raised.type, match=f"^cross_entropy: .*{message}"):
            F.cross_entropy(**options, backend=backend)


@on_cpu
@on_each
def test_values_that_torch_lets_pass(backend):
    x = torch.ones(3, 4)
    for smoothing in (-0.5, math.nan):
        with pytest.raises(RuntimeError, match=r"label_smoothing must be in \[0, 1\], got"):
            F.cross_entropy(x, LABELS, label_smoothing=smoothing, backend=backend)
    for name in ("cuda", ""):
        with pytest.raises(ValueError, match="backend must be one of native, triton, reference"):
            F.cross_entropy(x, LABELS, backend=name)


MIXED = [
    ({"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
    ({"lam": math.nan}, ValueError, r"lam must be in \[0, 1\], got nan"),
    ({"lam": torch.tensor([0.0, 1.5, 1])}, ValueError, r"lam must be in \[0, 1\], got"),
    ({"lam": torch.tensor([0.0, math.nan, 1])}, ValueError, r"lam must be in \[0, 1\], got"),
    ({"lam": torch.tensor(-0.5)}, ValueError, r"lam must be in \[0, 1\], got"),
    ({"lam": torch.ones(2)}, ValueError, "lam must be one number, or one for each of the 3"),
    ({"lam": torch.ones(3, 1)}, ValueError, "lam must be one number"),
    ({"lam": torch.ones(3).long()}, TypeError, "lam must be of a floating-point type, got int64"),
    ({"lam": torch.ones(3, requires_grad=True)}, RuntimeError, "lam must not require grad"),
    ({"lam": torch.ones(3, device="meta")}, RuntimeError, "lam must be on the input's device"),
    ({"labels": LABELS + 1}, IndexError, r"labels must be in \[0, 4\)"),
    ({"partner_labels": LABELS - 1}, IndexError, r"labels must be in \[0, 4\)"),
    ({"labels": LABELS[:2]}, ValueError, r"labels must have shape \(3,\), got \(2,\)"),
    ({"partner_labels": LABELS[:2]}, ValueError, r"partner_labels must have shape \(3,\)"),
    ({"partner_labels": LABELS.float()}, RuntimeError, "partner_labels must be int64"),
    ({"partner_labels": [0, 1, 2]}, TypeError, "partner_labels must be a Tensor, got list"),
    ({"label_smoothing": 0.2}, ValueError, "label_smoothing must be given once.*0.1 and 0.2"),
    ({"label_smoothing": 2.0}, (RuntimeError, ValueError), "label_smoothing must be"),
]


@on_cpu
@on_each
@pytest.mark.parametrize(("change", "error", "message"), MIXED, ids=[m[2] for m in MIXED])
def test_bad_mixed_targets(change, error, message, backend):
    x = torch.randn(3, 4)
    target = MixedTarget(LABELS, LABELS, 0.3)._replace(**change)
    smoothing = 0.1 if target.label_smoothing else 0.0
    for leaf in (x, x.clone().requires_grad_()):
        with pytest.raises(error, match=f"^cross_entropy: .*{message}"):
            F.cross_entropy(leaf, target, label_smoothing=smoothing, backend=backend)


# Registration, compilation, transforms


@on_each
def test_compiled_in_half_precision_and_under_autocast(backend):
    labels = torch.tensor([0, 3, 1], device=DEVICE)

    def function(x):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return F.cross_entropy(x, labels, backend=backend)

    with compiling("aot_eager") as (compiled, _):
        for f in (function, lambda x: F.cross_entropy(x, labels, backend=backend)):
            x = draw(3, 4, dtype=torch.bfloat16).requires_grad_()
            y, z = compiled(f)(x), f(x)
            assert y.dtype == z.dtype
            torch.testing.assert_close(y, z)
            torch.testing.assert_close(*(torch.autograd.grad(t, x)[0] for t in (y, z)))


def test_compile_recompiles_at_most_once_as_lambda_and_the_batch_change():
    def function(x, labels, lam):
        return F.cross_entropy(x, MixedTarget(labels, labels.flip(0), lam))

    with compiling("aot_eager") as (compiled, counter):
        traced = compiled(function)
        for lam in (0.1, 0.2, 0.35, 0.5):
            x = draw(4, 3)
            labels = labels_of(x)
            torch.testing.assert_close(traced(x, labels, lam), function(x, labels, lam))
        assert counter.frame_count <= 2
        for n in (5, 6, 9):
            x = draw(n, 3)
            labels = labels_of(x)
            torch.testing.assert_close(traced(x, labels, 0.25), function(x, labels, 0.25))
        assert counter.frame_count <= 3


def test_compiled_by_inductor():
    x = draw(6, 5, dtype=torch.float32).requires_grad_()
    target = MixedTarget(labels_of(x), labels_of(x), 0.3)
    with compiling("inductor") as (compiled, _):
        y = compiled(lambda x, target: F.cross_entropy(x * 2, target))(x, target)
        z = F.cross_entropy(x * 2, target)
        check_same(y, z, [x], rtol=1e-6, atol=1e-6)


def test_labels_are_mapped_as_well():
    rows, labels = draw(5, 4), torch.arange(5, device=DEVICE) % 4
    ours, theirs = (
        torch.func.vmap(torch.func.grad(f))(rows, labels)
        for f in (F.cross_entropy, TF.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)


def test_fx_proxies_pass():
    graph = torch.fx.symbolic_trace(lambda x, labels: F.cross_entropy(x, labels))
    assert any(node.target is F.cross_entropy for node in graph.graph.nodes)
    x = draw(3, 4)
    torch.testing.assert_close(graph(x, LABELS.to(DEVICE)), TF.cross_entropy(x, LABELS.to(DEVICE)))


def test_torch_function_subclasses():
    class Logged(torch.Tensor):
        called = ()

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.called += (function,)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = draw(3, 4)
    y = F.cross_entropy(x.as_subclass(Logged), LABELS.to(DEVICE), label_smoothing=0.1)
    assert F.cross_entropy in Logged.called
    assert isinstance(y, Logged)
    torch.testing.assert_close(
        y.as_subclass(torch.Tensor), TF.cross_entropy(x, LABELS.to(DEVICE), label_smoothing=0.1)
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="Triton runs there")
def test_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    OPS["cross_entropy"]._chosen.clear()  # what could run once is not asked again
    words = re.escape("cross_entropy: backend 'triton' cannot run")
    with pytest.raises(backends.BackendUnavailable, match=words):
        F.cross_entropy(torch.ones(3, 4), LABELS, backend="triton")
