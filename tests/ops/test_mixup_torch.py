"""Mixup and CutMix as torch's own: in place, errors, registration, compilation, transforms."""

import itertools
import math

import numpy
import pytest
import torch
from mixup_inputs import BYTES, LAYOUTS, boxes_of, by_torch, draw, integers, is_interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

from reg_kernels import functional as F

from support import DEVICE, DTYPES, implementations, isas

IMPLEMENTATIONS = implementations()
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's kernels assert values by themselves")


pytestmark = pytest.mark.usefixtures("one_thread")


# In place


@on_each
def test_in_place_counts_as_a_change_in_inference_mode_too(backend):
    x = torch.randn(4, 3, device=DEVICE)
    weight = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    product = (weight * x).sum()
    with torch.inference_mode():
        F.mixup(x, 0.3, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():  # a tensor of its own has no version
        x = torch.ones(4, 3, device=DEVICE)
        assert F.mixup(x, 0.3, inplace=True, backend=backend) is x


@on_each
def test_one_number_as_a_tensor(backend):
    x = torch.randn(4, 3, device=DEVICE)
    expected = F.mixup(x, 0.25, backend=backend)
    for shape in ((), (1,)):
        lam = torch.full(shape, 0.25, device=DEVICE)
        assert torch.equal(F.mixup(x, lam, backend=backend), expected)


@on_each
def test_means_and_deviations_of_numpy_and_those_that_require_grad(backend):
    x = torch.randn(4, 3, device=DEVICE)
    mean, std = numpy.array([0.0, 1.0, 2.0]), numpy.float32(2.0)
    expected = F.mixup(x, 0.25, mean=mean.tolist(), std=2.0, backend=backend)
    assert torch.equal(F.mixup(x, 0.25, mean=mean, std=std, backend=backend), expected)
    for name in ("mean", "std"):
        values = torch.ones(3, device=DEVICE, requires_grad=True)
        with pytest.raises(RuntimeError, match=f"{name} must not require grad"):
            F.mixup(x, 0.25, **{name: values}, backend=backend)
    with pytest.raises(TypeError, match="lam must be a number, got str"):
        F.mixup(x, "0.5", backend=backend)


CYCLES = {1: [(0,)], 4: list(itertools.permutations(range(4))), 7: [(1, 2, 0, 4, 3, 5, 6)]}


@on_each
@pytest.mark.parametrize("n", CYCLES)
def test_in_place_of_all_cycle_structures(n, backend):
    permutations = CYCLES[n][::7] if is_interpreted(backend) else CYCLES[n]
    shape = (n, 2, 3, 5) if is_interpreted(backend) else (n, 3, 17, 19)
    boxes = boxes_of(n, *shape[-2:])
    lam = torch.rand(n, device=DEVICE)
    dtypes = DTYPES[1 : 2 if is_interpreted(backend) else 3]
    for layout, dtype in itertools.product(("contiguous", "channels_last"), dtypes):
        x = LAYOUTS[layout](draw(*shape, dtype=dtype))
        for permutation in (None, *permutations):
            index = None if permutation is None else integers(*permutation)
            options = {"mean": 0.5, "std": 0.2, "backend": backend}
            for function, argument in ((F.mixup, lam), (F.cutmix, boxes)):
                expected = function(x, argument, index, **options)
                own = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=DEVICE)
                own.copy_(x)
                version = own._version
                assert function(own, argument, index, inplace=True, **options) is own
                assert own._version > version
                assert torch.equal(own, expected)


@on_each
@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced", "misaligned", "negated"])
def test_in_place_in_any_layout(layout, backend):
    x = LAYOUTS[layout](draw(5, 2, 3, 4))
    expected = F.mixup(x.clone(), 0.3, integers(1, 2, 0, 4, 3), backend=backend)
    assert F.mixup(x, 0.3, integers(1, 2, 0, 4, 3), inplace=True, backend=backend) is x
    assert torch.equal(x, expected)
    gray = draw(4, 3, 5)[:, :, ::2]
    expected = F.cutmix(gray.clone(), integers(1, 0, 2, 3), backend=backend)
    assert F.cutmix(gray, integers(1, 0, 2, 3), inplace=True, backend=backend) is gray
    assert torch.equal(gray, expected)


# Bad input

WHOLE = torch.tensor([0, 0, 5, 4])
BAD = [
    ("lam", -0.1, ValueError, r"lam must be in \[0, 1\], got -0.1"),
    ("lam", 1.5, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    ("lam", math.nan, ValueError, r"lam must be in \[0, 1\], got nan"),
    ("lam", torch.tensor([0.1, 1.5, 0.2]), ValueError, r"lam must be in \[0, 1\], got"),
    ("lam", torch.tensor([0.1, math.nan, 0.2]), ValueError, r"lam must be in \[0, 1\], got"),
    ("lam", torch.tensor(-0.5).half(), ValueError, r"lam must be in \[0, 1\], got"),
    ("lam", torch.ones(2), ValueError, "lam must be one number, or one for each of the 3 samples"),
    ("lam", torch.ones(3, 1), ValueError, "lam must be one number"),
    ("lam", torch.ones(3).long(), TypeError, "lam must be of a floating-point type, got int64"),
    ("lam", torch.ones(3, requires_grad=True), RuntimeError, "lam must not require grad"),
    ("lam", torch.ones(3, device="meta"), RuntimeError, "lam must be on the input's device"),
    ("lam", "half", TypeError, "lam must be a number, got str"),
    ("index", torch.tensor([0, 1, 3]), IndexError, r"index must be in \[0, 3\), got 3"),
    ("index", torch.tensor([0, -1, 2]), IndexError, r"index must be in \[0, 3\), got -1"),
    ("index", torch.tensor([0, 1]), ValueError, "index must name a partner for each of the 3"),
    ("index", torch.zeros(3, 1).long(), ValueError, "index must name a partner"),
    ("index", torch.zeros(3), IndexError, "index must be int64 or int32, got float32"),
    ("index", [0, 1, 2], TypeError, "index must be a Tensor, got list"),
    ("index", torch.zeros(3, device="meta").long(), RuntimeError, "index must be on the input's"),
    ("boxes", WHOLE + torch.tensor([0, 0, 1, 0]), ValueError, r"got \[0, 0, 6, 4\]"),
    ("boxes", WHOLE + torch.tensor([0, 0, 0, 1]), ValueError, r"got \[0, 0, 5, 5\]"),
    ("boxes", WHOLE - torch.tensor([1, 0, 0, 0]), ValueError, r"got \[-1, 0, 5, 4\]"),
    ("boxes", torch.tensor([3, 1, 2, 3]), ValueError, r"0 <= x1 <= x2 <= 5 and 0 <= y1 <= y2 <= 4"),
    ("boxes", torch.tensor([1, 3, 2, 2]), ValueError, r"got \[1, 3, 2, 2\]"),
    ("boxes", torch.stack([WHOLE, WHOLE, WHOLE - 1]), ValueError, r"got \[-1, -1, 4, 3\]"),
    ("boxes", torch.zeros(2, 4).long(), ValueError, r"boxes must be \(4,\) or \(3, 4\), got"),
    ("boxes", torch.zeros(4), IndexError, "boxes must be int64 or int32, got float32"),
    ("boxes", (0, 0, 1, 1), TypeError, "boxes must be a Tensor, got tuple"),
    ("boxes", WHOLE.to("meta"), RuntimeError, "boxes must be on the input's device"),
    ("mean", (0.5, 0.5, 0.5), ValueError, r"mean must be one number for each of the 2 channels"),
    ("mean", torch.ones(2, 1), ValueError, "mean must be one number"),
    ("mean", "0.5", TypeError, "mean must be a number, a sequence or a Tensor, got str"),
    ("std", torch.ones(3), ValueError, "std must be one number for each of the 2 channels"),
    ("std", (0.5, 0.0), ValueError, "std must not be 0, got"),
    ("std", 0, ValueError, "std must not be 0, got"),
    ("dtype", torch.int32, TypeError, "dtype must be one of float64, float32, float16, bfloat16"),
    ("dtype", torch.uint8, TypeError, "dtype must be one of float64"),
    ("dtype", torch.float16, RuntimeError, "inplace needs an output of the input's dtype"),
    ("memory_format", torch.channels_last, RuntimeError, "inplace cannot change the memory format"),
    ("memory_format", torch.channels_last_3d, RuntimeError, "does not fit 4 dimensions"),
    ("backend", "cuda", ValueError, "backend must be one of native, triton, reference"),
    ("index", torch.tensor([0, 1, 1]), ValueError, "inplace needs an index that is a permutation"),
]


@on_cpu
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"), BAD, ids=[f"{b[0]}-{b[3][:40]}" for b in BAD]
)
def test_bad_input_raises_and_changes_nothing(argument, value, error, message):
    x = draw(3, 2, 4, 5)
    before = x.clone()
    functions = [F.mixup] if argument == "lam" else [F.cutmix]
    if argument not in ("lam", "boxes"):
        functions = [F.mixup, F.cutmix]
    for function in functions:
        options = {argument: value, "inplace": True}
        if argument not in ("lam", "boxes"):
            options["lam" if function is F.mixup else "boxes"] = (
                0.5 if function is F.mixup else WHOLE
            )
        name = "" if argument == "backend" else f"{function.__name__}: .*"
        with pytest.raises(error, match=f"{name}(?:{message})"):
            function(x, **options)
        assert torch.equal(x, before)


@on_cpu
@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("of", ["every second column", "a part of the channels", "no elements"])
def test_values_are_looked_at_in_whatever_memory_the_input_has(of, backend):
    x = {
        "every second column": lambda: draw(3, 2, 4, 10)[..., ::2],
        "a part of the channels": lambda: draw(3, 4, 4, 5)[:, 1:3],
        "no elements": lambda: draw(3, 2, 0, 5),
    }[of]()
    before = x.clone()
    repeated = torch.tensor([0, 1, 1], device=DEVICE)
    for wrong, error in (
        (lambda: F.mixup(x, 0.5, repeated, inplace=True, backend=backend), ValueError),
        (lambda: F.mixup(x, 0.5, repeated + 5, backend=backend), IndexError),
        (lambda: F.mixup(x, torch.tensor(7.0, device=DEVICE), backend=backend), ValueError),
        (lambda: F.cutmix(x, WHOLE + 90, backend=backend), ValueError),
    ):
        with pytest.raises(error):
            wrong()
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [F.mixup, F.cutmix])
def test_bad_batches(function):
    name = function.__name__
    argument = 0.5 if function is F.mixup else WHOLE
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(RuntimeError, match=f"{name}: input must be one of float64.* or uint8"):
            function(torch.ones(3, 2, 4, 5).to(dtype), argument)
    with pytest.raises(TypeError, match=f"{name}: input must be a Tensor, got list"):
        function([1.0], argument)
    with pytest.raises(ValueError, match=f"{name}: input must be a batch"):
        function(torch.tensor(1.0), argument)
    with pytest.raises(ValueError, match=f"{name}: mean must be one number"):
        function(
            torch.ones(3, 4, 5) if function is F.cutmix else torch.ones(3), argument, mean=[1, 2]
        )
    with pytest.raises(RuntimeError, match=f"{name}: inplace needs an output of the input's dtype"):
        function(torch.ones(3, 2, 4, 5).to(BYTES), argument, inplace=True)
    if function is F.cutmix:
        with pytest.raises(ValueError, match="cutmix: input must be images"):
            F.cutmix(torch.ones(3, 4), WHOLE)


# Registration, compilation, transforms


@pytest.fixture
def counted():
    """torch.compile(fullgraph=True) by a backend, and how many programs that made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def test_compile_recompiles_at_most_once_as_lambda_and_the_batch_change(counted):
    compiled, counter = counted
    function = compiled(lambda x, lam: F.mixup(x, lam) * 1)
    x = draw(4, 3)
    for lam in (0.1, 0.2, 0.35, 0.5):
        assert torch.equal(function(x, lam), by_torch(x, lam, None))
    assert counter.frame_count <= 2
    for n in (5, 6, 9):
        x = draw(n, 3)
        assert torch.equal(function(x, 0.25), by_torch(x, 0.25, None))
    assert counter.frame_count <= 3
    targets = {str(n.target) for g in counter.graphs for n in g.graph.nodes}
    assert "reg_kernels.mixup.default" in targets or not isas()


def test_compiled_of_bytes(counted):
    images = draw(3, 2, 4, 5, dtype=BYTES)

    def function(images):
        return F.cutmix(images, WHOLE.to(DEVICE) // 2, std=(0.1, 0.2), dtype=torch.bfloat16)

    assert torch.equal(counted[0](function)(images), function(images))


def test_compiled_by_inductor():
    torch._dynamo.reset()
    x = draw(4, 3, 4, 5, dtype=torch.float32).requires_grad_()

    def function(x, lam):
        return F.mixup(x * 2, lam, memory_format=torch.channels_last) + 1

    for f in (torch.compile(function, fullgraph=True), function):
        y = f(x, 0.3)
        torch.testing.assert_close(y, 2 * by_torch(x, 0.3, None) + 1)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        (expected,) = torch.autograd.grad((2 * by_torch(x, 0.3, None) + 1).square().sum(), x)
        torch.testing.assert_close(gradient, expected)


def test_shares_and_partners_are_mapped_as_well():
    x, index = draw(3, 2, 2, 3), integers(1, 1, 0)

    def mixed(x, lam, index):
        return F.mixup(x, lam, index, std=0.5)

    lams, lists = torch.rand(4, 3, dtype=x.dtype), torch.stack([index, index.flip(0)] * 2)
    mapped = torch.func.vmap(mixed, in_dims=(None, 0, 0))(x, lams, lists)
    each = [mixed(x, a, b) for a, b in zip(lams, lists, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))


def test_what_was_made_of_shapes_alone_is_not_kept_for_real_tensors():
    F.mixup(torch.empty(3, 2, dtype=BYTES, device="meta"), 0.5, mean=(0.1, 0.2))
    with FakeTensorMode():
        F.mixup(torch.empty(3, 2, dtype=BYTES), 0.5, mean=(0.1, 0.2))
    assert F.mixup(draw(3, 2, dtype=BYTES), 0.5, mean=(0.1, 0.2)).isfinite().all()


def test_fx_proxies_pass():
    graph = torch.fx.symbolic_trace(lambda x: F.mixup(x, 0.25))
    assert any(node.target is F.mixup for node in graph.graph.nodes)
    assert graph(draw(4, 3)).shape == (4, 3)


def test_torch_function_subclasses():
    class Logged(torch.Tensor):
        called = ()

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.called += (function,)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = draw(4, 3, 2, 2)
    y = F.mixup(x.as_subclass(Logged), 0.3, integers(1, 0, 2, 3), std=0.5)
    assert isinstance(y, Logged)
    assert torch.equal(y.as_subclass(torch.Tensor), F.mixup(x, 0.3, integers(1, 0, 2, 3), std=0.5))
    F.cutmix(x.as_subclass(Logged), integers(0, 0, 1, 1), inplace=True)
    assert F.mixup in Logged.called and F.cutmix in Logged.called
