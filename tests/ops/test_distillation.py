"""Distillation: torch's composition, its values, gradients, errors, registration, compilation."""

import itertools
import math

import pytest
import torch
from loss_inputs import (
    IGNORED,
    LAYOUTS,
    check_twice,
    chosen,
    compiling,
    distillation_by_torch,
    draw,
    is_interpreted,
    labels_of,
    results,
)

from reg_kernels import functional as F
from reg_kernels._mixed_target import MixedTarget

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas

IMPLEMENTATIONS = implementations()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
native = pytest.mark.skipif(not isas(), reason="the native library was not built")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's kernels assert values by themselves")
REDUCTIONS = ("none", "mean", "sum")
TEMPERATURES = (1.0, 2.0, 0.5, 4.0, 1.5)
INF, NAN = math.inf, math.nan


pytestmark = pytest.mark.usefixtures("one_thread")


def check_same(ours, theirs, rtol=1e-11, atol=1e-11):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


# Values and gradients


SHAPES = [(5,), (4, 7), (3, 1), (3, 5, 6), (2, 3, 4, 5), (2, 3, 2, 2, 3)]
LARGE = [(37, 1003), (300, 10), (3, 19, 33, 21), (2, 301, 17), (5, 2, 100)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@on_each
def test_against_torchs_composition(shape, layout, backend):
    if is_interpreted(backend) and shape in LARGE:
        pytest.skip("too large for Triton's interpreter")
    x, other = LAYOUTS[layout](draw(*shape)), draw(*shape)
    teachers = itertools.cycle(
        (other, LAYOUTS["channels_last"](other), LAYOUTS["strided"](other), LAYOUTS[layout](other))
    )
    weight = torch.rand(shape[min(1, len(shape) - 1)], dtype=x.dtype, device=DEVICE)
    for temperature, alpha, w, reduction, smoothing in chosen(
        *(backend, layout, TEMPERATURES, (0.0, 0.3, 1.0), (None, weight), REDUCTIONS, (0.0, 0.1)),
        every=19,
    ):
        ignored = 1 if len(shape) > 1 else IGNORED
        a, b = labels_of(x, ignored), labels_of(x, ignored)
        options = {"weight": w, "ignore_index": ignored, "label_smoothing": smoothing}
        options |= {"temperature": temperature, "alpha": alpha, "reduction": reduction}
        for target in (a, MixedTarget(a, b, 0.25)):
            args = (x, next(teachers), target)
            ours = results(F.distillation_loss, *args, **options, backend=backend)
            check_same(ours, results(distillation_by_torch, *args, **options))


@on_each
@pytest.mark.parametrize("of_teacher", DTYPES, ids=DTYPE_IDS)
@dtypes
def test_a_teacher_of_another_dtype(dtype, of_teacher, backend):
    for shape in ((4, 7), (3, 5, 2))[is_interpreted(backend) :]:
        x, teacher = draw(*shape, dtype=dtype), draw(*shape, dtype=of_teacher)
        labels = labels_of(x)
        loss, gradient = results(F.distillation_loss, x, teacher, labels, backend=backend)
        assert (loss.dtype, gradient.dtype) == (dtype, dtype)
        # Beside float64 students a float64 teacher; with others it counts in float32.
        truth = results(distillation_by_torch, x.double(), teacher.double(), labels)
        eps = torch.finfo(dtype).eps
        eps += torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 16
        check_same([loss.double(), gradient.double()], truth, eps, eps / 2)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = F.distillation_loss(x, teacher, labels, backend=backend)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)


@on_each
def test_each_sample_of_its_own_lambda(backend):
    x, teacher = draw(4, 5, 3), draw(4, 5, 3)
    a, b = labels_of(x), labels_of(x)
    each = torch.tensor([0.0, 0.3, 1.0, 0.5], dtype=x.dtype, device=DEVICE)
    target = MixedTarget(a, b, each, 0.1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = target._replace(lam=each.to(dtype))
        wide = target._replace(lam=each.to(dtype).double().view(-1, 1))
        options = {"reduction": "none", "temperature": 1.5}
        ours = results(F.distillation_loss, x, teacher, given, **options, backend=backend)
        check_same(
            ours, results(distillation_by_torch, x, teacher, wide, **options, label_smoothing=0.1)
        )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(3, 5), (6, 9, 4), (70, 1000), (9, 19, 40), (3, 4099)], ids=str)
@dtypes
@on_each
def test_error_is_at_most_twice_torchs(dtype, shape, temperature, backend):
    if is_interpreted(backend):
        pytest.skip("takes Triton's interpreter minutes; the cases hold it to the same")
    for layout in ("contiguous", "channels_last"):
        x, teacher = (LAYOUTS[layout](3 * draw(*shape)).to(dtype) for _ in range(2))
        labels = labels_of(x)
        for alpha, reduction in itertools.product((0.9, 0.3), REDUCTIONS):
            options = {"temperature": temperature, "alpha": alpha, "reduction": reduction}
            ours = results(F.distillation_loss, x, teacher, labels, **options, backend=backend)
            theirs = results(distillation_by_torch, x, teacher, labels, **options)
            truth = results(distillation_by_torch, x.double(), teacher.double(), labels, **options)
            if dtype == torch.float64:
                check_same(ours, truth)
            else:
                check_twice(ours, theirs, truth)


ROWS = {
    "large": [1e4, -1e4, 0, 1, 2],
    "large and close": [1e4, 1e4 - 8, -1e4, 9992, 9984],
    "masked": [-INF, 1, 2, -INF, 3],
    "masked elsewhere": [1, -INF, 2, 0, 3],
    "one class left": [-INF, -INF, 2, -INF, -INF],
    "all masked": [-INF] * 5,
    "infinite": [INF, 1, 2, 3, 4],
    "NaN": [NAN, 1, 2, 3, 4],
    "equal": [-7.0] * 5,
    "plain": [0.1, -0.5, 2, 1, 0.3],
}


@pytest.mark.parametrize("of_student", ROWS)
@pytest.mark.parametrize("of_teacher", ROWS)
@on_each
def test_extreme_logits(of_student, of_teacher, backend):
    if is_interpreted(backend) and of_teacher not in (of_student, "masked"):
        pytest.skip("takes Triton's interpreter minutes")
    rows = [[*ROWS["plain"]] * 4, [*ROWS[of_student]] * 4, [*ROWS[of_student][::-1]] * 4]
    others = [[*ROWS["plain"][::-1]] * 4, [*ROWS[of_teacher]] * 4, [*ROWS[of_teacher][::-1]] * 4]
    labels = torch.tensor([0, 3, 7], device=DEVICE)
    # In float32 the reference divides large logits by T before it subtracts them.
    computed = DTYPES[: 1 if backend == "reference" else 2]
    cases = list(itertools.product(computed, (1.0, 1.5, 0.5), ("none", "mean")))
    for dtype, temperature, reduction in cases[:: 5 if is_interpreted(backend) else 1]:
        x, teacher = (torch.tensor(r, dtype=dtype, device=DEVICE) for r in (rows, others))
        options = {"temperature": temperature, "alpha": 0.6, "reduction": reduction}
        ours = results(F.distillation_loss, x, teacher, labels, **options, backend=backend)
        truth = results(distillation_by_torch, x.double(), teacher.double(), labels, **options)
        eps = torch.finfo(dtype).eps
        # In float64 the error is that of the truth, which has divided logits of 1e4 first.
        atol = 64 * eps * (1e4 if dtype == torch.float64 else 1)
        check_same([t.double() for t in ours], truth, 16 * eps, atol)


@on_each
def test_an_ignored_label_leaves_the_divergence(backend):
    x, teacher = draw(3, 4, 2), draw(3, 4, 2)
    labels = labels_of(x)
    labels[1] = IGNORED
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "alpha": 0.6}
        for target in (labels, MixedTarget(labels, labels, 0.3)):
            ours = results(F.distillation_loss, x, teacher, target, **options, backend=backend)
            check_same(ours, results(distillation_by_torch, x, teacher, labels, **options))
        target = torch.full_like(labels, IGNORED)
        ours = results(F.distillation_loss, x, teacher, target, **options, backend=backend)
        check_same(ours, results(distillation_by_torch, x, teacher, target, **options))
        assert ours[1].isfinite().all()  # the divergence's, where the mean of no label is NaN


@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0)], ids=str)
@on_each
def test_of_nothing(shape, backend):
    x = draw(*shape)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=DEVICE)
    for reduction in REDUCTIONS:
        ours = results(F.distillation_loss, x, x, labels, reduction=reduction, backend=backend)
        check_same(ours, results(distillation_by_torch, x, x, labels, reduction=reduction))


@on_each
def test_a_loss_scale_keeps_small_gradients_of_float16(backend):
    x, teacher = (draw(64, 100 if is_interpreted(backend) else 1000).half() for _ in range(2))
    labels = labels_of(x)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.float16):  # as with a GradScaler
        y = F.distillation_loss(leaf, teacher, labels, backend=backend)
    (gradient,) = torch.autograd.grad(65536.0 * y, leaf)
    (expected,) = torch.autograd.grad(65536.0 * distillation_by_torch(wide, teacher, labels), wide)
    largest = float(expected.abs().max())
    assert float((gradient - expected).abs().max()) <= 2**-11 * largest + 1e-4
    assert (gradient != 0).float().mean() > 0.99


@on_each
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_by_each_way_through_the_graph(reduction, backend):
    x, teacher = draw(3, 4, 2).requires_grad_(), draw(3, 4, 2).requires_grad_()
    labels = labels_of(x)
    options = {"reduction": reduction}

    def function():
        return F.distillation_loss(x, teacher, labels, **options, backend=backend)

    z = distillation_by_torch(x, teacher.detach(), labels, **options)
    g = draw(*z.shape)
    (expected,) = torch.autograd.grad(z, x, g)
    y = function()
    gradients = [torch.autograd.grad(y, x, s * g, retain_graph=True)[0] for s in (1, 3)]
    check_same(gradients, [expected, 3 * expected])
    gradients[0].zero_()  # given away
    for create_graph in (True, False):
        (gradient,) = torch.autograd.grad(y, x, g, retain_graph=True, create_graph=create_graph)
        check_same([gradient], [expected])
    y.backward(g)
    assert teacher.grad is None
    check_same([x.grad], [expected])
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(g)
    h = x * 1
    y = F.distillation_loss(h, teacher, labels, **options, backend=backend)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Bad input

LABELS = torch.tensor([0, 1, 3])
BAD = [
    *(({"temperature": t}, ValueError, f"temperature must be positive and finite, got {t}")
      for t in (0.0, -1.0, INF, -INF, NAN)),
    *(({"alpha": a}, ValueError, rf"alpha must be in \[0, 1\], got {a}") for a in (-0.1, 1.5, NAN)),
    ({"teacher": torch.ones(3, 5)}, RuntimeError, r"teacher must have the input's shape, \(3, 4\)"),
    ({"teacher": torch.ones(4)}, RuntimeError, "teacher must have the input's shape"),
    ({"teacher": torch.ones(3, 4).long()}, NotImplementedError, "teacher must be one of float64"),
    ({"teacher": [1.0]}, TypeError, "teacher must be a Tensor, got list"),
    ({"teacher": torch.ones(3, 4, device="meta")}, RuntimeError, "teacher must be on the input's"),
    ({"target": torch.rand(3, 4)}, RuntimeError, "target must be int64 class indices or a Mixed"),
    ({"target": LABELS + 1}, IndexError, r"labels must be in \[0, 4\)"),
    ({"target": LABELS[:2]}, ValueError, r"target must have shape \(3,\), got \(2,\)"),
    ({"target": MixedTarget(LABELS, LABELS, 1.5)}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    ({"target": MixedTarget(LABELS, LABELS, torch.tensor([1, NAN, 0]))}, ValueError, "lam must be"),
    ({"target": MixedTarget(LABELS, LABELS - 1, 0.5)}, IndexError, r"labels must be in \[0, 4\)"),
    ({"target": MixedTarget(LABELS, LABELS, 0.5, 0.2)}, ValueError, "must be given once"),
    ({"weight": torch.ones(5)}, RuntimeError, "weight must have one number for each of the 4"),
    ({"label_smoothing": 1.5}, RuntimeError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be 'none', 'mean' or 'sum'"),
    ({"input": torch.ones(3, 4).long()}, NotImplementedError, "input must be one of float64"),
    ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
]  # fmt: skip


@on_cpu
@on_each
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:50] for b in BAD])
def test_bad_input(change, error, message, backend):
    options = {"input": torch.randn(3, 4), "teacher": torch.randn(3, 4), "target": LABELS}
    options |= {"label_smoothing": 0.1} | change
    with pytest.raises(error, match=f"^distillation_loss: .*{message}"):
        F.distillation_loss(**options, backend=backend)


# Registration, compilation, transforms


def test_compiled_by_inductor():
    x, teacher = (draw(6, 5, dtype=torch.float32) for _ in range(2))
    labels = labels_of(x)
    with compiling("inductor") as (compiled, _):
        ours = results(compiled(lambda *args: F.distillation_loss(*args) * 2), x, teacher, labels)
        theirs = results(lambda *args: distillation_by_torch(*args) * 2, x, teacher, labels)
        check_same(ours, theirs, 1e-5, 1e-6)


def test_torch_function_subclasses():
    class Logged(torch.Tensor):
        called = ()

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.called += (function,)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, teacher = draw(3, 4), draw(3, 4)
    y = F.distillation_loss(x, teacher.as_subclass(Logged), LABELS.to(DEVICE), alpha=0.3)
    assert F.distillation_loss in Logged.called
    torch.testing.assert_close(
        y.as_subclass(torch.Tensor), distillation_by_torch(x, teacher, LABELS.to(DEVICE), alpha=0.3)
    )
