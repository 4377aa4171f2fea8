"""The BatchNorm layers beside torch's, and the fused chain beside its layers one by one."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reg_kernels
from reg_kernels import functional as F
from reg_kernels import nn

from support import DEVICE, implementations

C = 5
SHAPES = {"1d": (4, C, 7), "2d": (4, C, 3, 2), "3d": (2, C, 2, 3, 3)}
FLAT = (6, C)  # BatchNorm1d's other rank
TORCH_TAKES_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm1d).parameters
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1},
    "large eps": {"eps": 0.5},
    # Not every torch's constructor takes it, as ours does.
    **({"no bias": {"bias": False}} if TORCH_TAKES_BIAS else {}),
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "nothing": {"affine": False, "track_running_stats": False, "momentum": None},
}
ACTIVATIONS = {
    None: lambda z: z,
    "relu": TF.relu,
    "leaky_relu": lambda z: TF.leaky_relu(z, 0.2),
    "silu": TF.silu,
    "gelu": TF.gelu,
}
each = pytest.mark.parametrize("rank", SHAPES)
on_each = pytest.mark.parametrize("backend", implementations())
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
options = pytest.mark.parametrize("arguments", OPTIONS.values(), ids=OPTIONS)


pytestmark = pytest.mark.usefixtures("one_thread")


def filled(layer):
    """The layer with parameters and statistics unlike the initial ones."""
    with torch.no_grad():
        for name, values in [*layer.named_parameters(), *layer.named_buffers()]:
            if values.is_floating_point():
                values.uniform_(0.5, 2) if name in ("weight", "running_var") else values.normal_()
    return layer


def pair(rank, arguments=None, channels=C, backend=None, dtype=torch.float64):
    """Our layer and torch's, in the same state."""
    arguments = {"device": DEVICE, "dtype": dtype, **(arguments or {})}
    theirs = filled(getattr(torch.nn, f"BatchNorm{rank}")(channels, **arguments))
    ours = getattr(nn, f"BatchNorm{rank}")(channels, **arguments, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(*shape, dtype=torch.float64):
    return (2 * torch.randn(shape, dtype=torch.float64) + 0.7).to(dtype).to(DEVICE)


def step(layer, x, *rest, g=None):
    """Output and every gradient of one call, for a gradient that is different at each element."""
    inputs = [t.detach().requires_grad_() for t in (x, *rest)]  # of the same strides
    y = layer(*inputs)
    if g is None:
        g = torch.arange(y.numel(), dtype=torch.float64, device=y.device).sin().view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *layer.parameters()], g.to(y.dtype))]


def assert_close(ours, theirs, tolerance=1e-11):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_state(ours, theirs, tolerance=1e-11):
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert_close(list(a.values()), list(b.values()), tolerance)


# Constructor and state


@each
@pytest.mark.parametrize(
    "arguments",
    [*OPTIONS.values(), {"device": "meta"}, {"dtype": torch.bfloat16}],
    ids=[*OPTIONS, "meta", "bfloat16"],
)
def test_constructor_repr_and_state_are_torchs(rank, arguments):
    ours = getattr(nn, f"BatchNorm{rank}")(C, **arguments)
    theirs = getattr(torch.nn, f"BatchNorm{rank}")(C, **arguments)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, torch.nn.modules.batchnorm._BatchNorm)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    for a, b in zip(
        [*ours.named_parameters(), *ours.named_buffers()],
        [*theirs.named_parameters(), *theirs.named_buffers()],
        strict=True,
    ):
        assert a[0] == b[0]
        assert (a[1].dtype, a[1].device, a[1].shape) == (b[1].dtype, b[1].device, b[1].shape)
        assert a[1].requires_grad == b[1].requires_grad
        assert a[1].is_meta or torch.equal(a[1], b[1])
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@each
def test_positional_arguments(rank):
    arguments = (C, 1e-3, 0.2, False, False, "meta", torch.float64)
    ours = getattr(nn, f"BatchNorm{rank}")(*arguments)
    assert repr(ours) == repr(getattr(torch.nn, f"BatchNorm{rank}")(*arguments))
    act = getattr(nn, f"BatchNormAct{rank}")(*arguments)
    assert (act.eps, act.momentum, act.affine, act.track_running_stats) == (1e-3, 0.2, False, False)
    with pytest.raises(TypeError):
        getattr(nn, f"BatchNorm{rank}")(*arguments, True)  # bias goes by name, as in torch


@each
def test_bad_arguments(rank):
    for cls in (getattr(nn, f"BatchNorm{rank}"), getattr(nn, f"BatchNormAct{rank}")):
        for eps in (0.0, -1e-5):  # taken by the constructor as torch's does, refused by the call
            with pytest.raises(ValueError, match="eps must be positive in training"):
                cls(C, eps=eps)(draw(*SHAPES[rank]).float())
        with pytest.raises(ValueError, match="backend must be one of"):
            cls(C, backend="cuda")


# Values


@on_each
@options
@pytest.mark.parametrize(
    ("rank", "shape"),
    [("1d", FLAT), *SHAPES.items(), ("1d", (7, 1)), ("2d", (3, 1, 2, 5))],
    ids=str,
)
def test_training_and_evaluation_are_torchs(rank, shape, arguments, backend):
    ours, theirs = pair(rank, arguments, shape[1], backend)
    for _ in range(3):
        x = draw(*shape)
        assert_close(step(ours, x), step(theirs, x))
        assert_same_state(ours, theirs)
    ours.eval()
    theirs.eval()
    before = copy.deepcopy(ours.state_dict())
    assert_close(step(ours, x), step(theirs, x))
    assert_close(ours.state_dict().values(), before.values(), 0)


@on_each
def test_the_layer_forces_its_backend(backend):
    suffix = "default" if backend == "native" else backend
    for layer in (nn.BatchNorm2d(C, backend=backend), nn.BatchNormAct2d(C, backend=backend)):
        y = layer.to(DEVICE)(draw(*SHAPES["2d"], dtype=torch.float32))
        assert y.grad_fn.call[0] is getattr(torch.ops.reg_kernels.batch_norm, suffix)


@on_each
@pytest.mark.parametrize("with_gradient", [False, True])
def test_autograd_hears_of_the_statistics_change(with_gradient, backend):
    layer = nn.BatchNorm2d(C, dtype=torch.float64, device=DEVICE, backend=backend)
    product = layer.running_mean * torch.ones(C, requires_grad=True).to(DEVICE)
    versions = [buffer._version for buffer in layer.buffers()]
    with torch.set_grad_enabled(with_gradient):
        layer(draw(*SHAPES["2d"]))
    assert all(b._version > v for b, v in zip(layer.buffers(), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("gone", ["running_mean, running_var", "track_running_stats", "counter"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_attributes_changed_behind_the_constructor(gone, training, momentum):
    layers = pair("2d", {"momentum": momentum})
    for layer in layers:
        if gone == "track_running_stats":
            layer.track_running_stats = False
        elif gone == "counter":
            layer.num_batches_tracked = None
        else:
            layer.running_mean = layer.running_var = None
        layer.train(training)
    x = draw(*SHAPES["2d"])
    assert_close(*(step(layer, x) for layer in layers))
    assert_same_state(*layers)


@on_each
def test_cumulative_average_is_the_mean_over_batches(backend):
    layer = nn.BatchNorm1d(C, momentum=None, dtype=torch.float64, device=DEVICE, backend=backend)
    batches = [draw(n, C) for n in (4, 9, 2, 5)]
    for x in batches:
        layer(x)
    means = torch.stack([x.mean(0) for x in batches]).mean(0)
    variances = torch.stack([x.var(0) for x in batches]).mean(0)
    assert_close([layer.running_mean, layer.running_var], [means, variances])
    assert layer.num_batches_tracked == 4


@on_each
def test_a_counter_past_32_bits(backend):
    ours, theirs = pair("2d", {"momentum": None}, backend=backend)
    for layer in (ours, theirs):
        layer.num_batches_tracked.fill_(2**40)
        layer(draw(*SHAPES["2d"]) * 0 + 1e9 * torch.arange(4, device=DEVICE).view(4, 1, 1, 1))
    assert ours.num_batches_tracked == 2**40 + 1
    assert_same_state(ours, theirs)


def test_momentum_none_reads_no_value_on_the_host():
    # A fake tensor has no values: whatever asks for one raises.
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(SHAPES["2d"], requires_grad=True)
        ours, theirs = nn.BatchNorm2d(C, momentum=None), torch.nn.BatchNorm2d(C, momentum=None)
        for layer in (ours, theirs):
            layer.num_batches_tracked = torch.empty((), dtype=torch.int64)
        ours(x).sum().backward()
        with pytest.raises(DataDependentOutputException):
            theirs(x)


def test_update_bn_of_torchs_swa_utils():
    def model(layer):
        return torch.nn.Sequential(torch.nn.Flatten(2), layer)

    ours, theirs = (model(layer) for layer in pair("1d"))
    batches = [draw(3, C, 2, 4) for _ in range(4)]
    for m in (ours, theirs):
        torch.optim.swa_utils.update_bn(batches, m)
        assert m[1].momentum == 0.1
    assert_same_state(ours, theirs)
    assert ours[1].num_batches_tracked == 4


# Errors

X = torch.linspace(-1, 1, 4 * C * 6).view(4, C, 3, 2)


def _set(name, values):
    return lambda layer: setattr(layer, name, values)


def _parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


# name: (what is done to the layer, its input); the same for ours and for torch's
BAD_CALLS = {
    "one value a channel": (lambda layer: None, torch.ones(1, C, 1, 1)),
    "rank 3": (lambda layer: None, X[0]),
    "rank 5": (lambda layer: None, X[None]),
    "channels": (lambda layer: None, torch.ones(4, C + 1, 3, 2)),
    "eps 0": (_set("eps", 0.0), X),
    "eps below 0": (_set("eps", -1e-5), X),
    "weight's size": (_set("weight", _parameter(C + 2)), X),
    "bias' size": (_set("bias", _parameter(C + 2)), X),
    "weight's dtype": (_set("weight", _parameter(C, dtype=torch.float64)), X),
    "running_mean's size": (_set("running_mean", torch.ones(C - 1)), X),
    "running_var's size": (_set("running_var", torch.ones(C - 1)), X),
    "running_var's dtype": (_set("running_var", torch.ones(C).double()), X),
    "no running_mean": (_set("running_mean", None), X),
    "no running_var": (_set("running_var", None), X),
    "float64 input": (lambda layer: None, X.double()),
    "float16 layer": (lambda layer: layer.half(), X),
    "int64": (lambda layer: None, X.long()),
    "complex64": (lambda layer: None, X.to(torch.complex64)),
}
ONLY_IN_TRAINING = ("one value a channel", "eps 0")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_as_torchs_and_change_nothing(case, training, momentum):
    if not training and case in ONLY_IN_TRAINING:
        pytest.skip("no error in evaluation, neither here nor in torch")
    spoil, x = BAD_CALLS[case]
    theirs = torch.nn.BatchNorm2d(C, momentum=momentum).train(training)
    spoil(theirs)
    with pytest.raises(Exception) as expected:
        theirs(x)
    for cls in (nn.BatchNorm2d, nn.BatchNormAct2d):
        layer = cls(C, momentum=momentum).train(training)
        if cls is nn.BatchNormAct2d:
            layer.drop = 0.5
        spoil(layer)
        before, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
        versions = [buffer._version for buffer in layer.buffers()]
        with pytest.raises(type(expected.value)) as error:
            layer(x)
        assert type(error.value) is type(expected.value)
        assert_close(layer.state_dict().values(), before.values(), 0)
        assert [buffer._version for buffer in layer.buffers()] == versions
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("rank", "shape"), [("1d", (1, C)), ("1d", (1, C, 1)), ("2d", (1, C, 1, 1)), ("3d", (1, C))]
)
def test_one_value_a_channel_and_ranks(rank, shape):
    shape = shape if rank != "3d" else (1, C, 1, 1, 1)
    for layer in (getattr(nn, f"BatchNorm{rank}")(C), getattr(nn, f"BatchNormAct{rank}")(C)):
        with pytest.raises(ValueError, match="expected more than 1 value per channel when train"):
            layer(torch.ones(shape))
        assert layer.num_batches_tracked == 0
        assert layer.eval()(torch.ones(shape)).shape == shape
        for wrong in ((C,), (2, C, 3, 3, 3, 3)):
            with pytest.raises(ValueError, match=r"Norm(Act)?.d: input must be .*D, got .D"):
                layer(torch.ones(wrong))


# Frozen


@on_each
def test_frozen_gradients_need_no_input(backend):
    # A frozen layer is a multiply-add: where the input is infinite its gradient is not.
    ours, theirs = (layer.eval() for layer in pair("2d", {"affine": False}, backend=backend))
    x = draw(*SHAPES["2d"])
    x[0, 0, 0, 0] = float("inf")
    gradients = [step(layer, x)[1] for layer in (ours, theirs)]
    assert gradients[0].isfinite().all()
    assert_close([gradients[0]], [gradients[1]])


def test_a_frozen_layer_in_a_model_in_training():
    ours, theirs = (torch.nn.Sequential(layer).train() for layer in pair("2d"))
    for model in (ours, theirs):
        model[0].eval()
        for p in model[0].parameters():
            p.requires_grad_(False)
    x, results = draw(*SHAPES["2d"]), []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
    assert_close(*results)
    assert_same_state(ours, theirs)


# state_dict, copies


@options
@each
def test_state_dicts_load_both_ways(rank, arguments):
    ours, theirs = pair(rank, arguments)
    x = draw(*SHAPES[rank])
    for source, target in ((ours, theirs), (theirs, ours)):
        source(x)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_state(source, target, 0)
    act = getattr(nn, f"BatchNormAct{rank}")(C, **arguments, dtype=torch.float64, device=DEVICE)
    act.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(act, theirs, 0)
    theirs.load_state_dict(act.state_dict(), strict=True)


@pytest.mark.parametrize("metadata", [None, {"": {"version": 1}}])
def test_a_state_dict_of_version_1_has_no_counter(metadata):
    ours, theirs = pair("2d")
    old = filled(torch.nn.BatchNorm2d(C, dtype=torch.float64)).state_dict()
    del old["num_batches_tracked"]
    old._metadata = metadata
    for layer in (ours, theirs):
        layer.load_state_dict(old, strict=True)
    assert_same_state(ours, theirs, 0)
    assert torch.equal(ours.running_mean.cpu(), old["running_mean"])
    old = torch.nn.BatchNorm2d(C).state_dict()
    del old["num_batches_tracked"]  # of version 2, which has it
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(old)


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=range(3)
)
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm3d", "BatchNormAct2d"])
def test_copies(name, copier):
    layer = filled(getattr(nn, name)(C, momentum=None, dtype=torch.float64, backend="reference"))
    if name == "BatchNormAct2d":
        layer.activation, layer.drop = "leaky_relu", 0.25
    x = draw(*SHAPES[name[-2:]]).cpu()
    layer(x)
    twin = copier(layer)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    assert twin.backend == "reference"
    assert_same_state(twin, layer, 0)
    torch.manual_seed(1)
    expected = step(layer, x)
    assert twin.num_batches_tracked == 1  # a copy of the buffers, not the same ones
    torch.manual_seed(1)
    assert_close(step(twin, x), expected, 0)


# dtypes


@on_each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs(backend, dtype, layer_dtype, training):
    if layer_dtype not in (dtype, torch.float32):
        pytest.skip("two 16-bit types do not go together, in torch neither")
    ours, theirs = pair("2d", backend=backend)
    x = draw(*SHAPES["2d"], dtype=dtype)
    g = torch.randn(x.shape).to(dtype).to(DEVICE)
    ours.to(layer_dtype).train(training)
    theirs.load_state_dict(ours.state_dict())
    theirs.train(training)
    results, truth = step(ours, x, g=g), step(theirs, x.double(), g=g.double())
    assert [t.dtype for t in results] == [dtype, dtype, layer_dtype, layer_dtype]
    assert ours.running_mean.dtype == layer_dtype
    # Computed in float32, one rounding at the end; Triton's interpreter truncates bfloat16.
    roundings = 1 if backend == "triton" and DEVICE == "cpu" else 0.5
    for a, b in zip(
        [*results, ours.running_mean, ours.running_var],
        [*truth, theirs.running_mean, theirs.running_var],
        strict=True,
    ):
        bound = float(b.abs().max()) * (torch.finfo(a.dtype).eps * roundings + 2e-6)
        assert float((a.double() - b).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_layer_rounds_as_torchs(dtype):
    ours, theirs = pair("2d", dtype=dtype)
    for _ in range(3):
        x = draw(*SHAPES["2d"], dtype=dtype)
        assert_close(step(ours, x), step(theirs, x), 3 * torch.finfo(dtype).eps)
        assert_same_state(ours, theirs, 2 * torch.finfo(dtype).eps)


def test_autocast():
    def model(cls, **arguments):
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Conv2d(3, C, 3), cls(C, **arguments)).to(DEVICE)

    x = draw(4, 3, 8, 8, dtype=torch.float32)
    ours, theirs = model(nn.BatchNorm2d), model(torch.nn.BatchNorm2d)
    fused = model(nn.BatchNormAct2d, activation=None)
    for m in (ours, theirs, fused):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in m.parameters())
        assert m[1].running_mean.dtype == torch.float32
    for m in (ours, fused):
        assert_same_state(m, theirs, 1e-5)
        assert_close([p.grad for p in m[1].parameters()], [p.grad for p in theirs[1].parameters()],
                     2**-6)  # fmt: skip


def test_double_and_back():
    ours, theirs = pair("2d", dtype=torch.float32)
    x = draw(*SHAPES["2d"])
    for layer in (ours, theirs):
        layer.double()
    assert_close(step(ours, x), step(theirs, x))
    for layer in (ours, theirs):
        layer.float()
    assert ours.num_batches_tracked.dtype == torch.int64
    assert_close(step(ours, x.float()), step(theirs, x.float()), 1e-4)


# Empty batches


@options
@pytest.mark.parametrize(
    ("rank", "shape"),
    [("1d", (0, C)), ("1d", (0, C, 4)), ("2d", (3, C, 0, 2)), ("3d", (0, C, 1, 1, 1))],
)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_are_torchs(rank, shape, arguments, training):
    ours, theirs = (layer.train(training) for layer in pair(rank, arguments))
    before = copy.deepcopy(ours.state_dict())
    results = step(ours, draw(*shape)), step(theirs, draw(*shape))
    assert_close(*results, 0)
    assert results[0][0].shape == shape
    assert all((gradient == 0).all() for gradient in results[0][1:])
    assert_same_state(ours, theirs, 0)
    for name in ("running_mean", "running_var"):
        assert name not in before or torch.equal(ours.state_dict()[name], before[name])


def test_an_empty_batch_of_the_fused_layer():
    layer = nn.BatchNormAct2d(C, drop=0.5, dtype=torch.float64, device=DEVICE)
    random = torch.get_rng_state()
    x = draw(0, C, 3, 2)
    results = step(layer, x, x)
    assert [tuple(t.shape) for t in results] == [x.shape] * 3 + [(C,)] * 2
    assert all((gradient == 0).all() for gradient in results[1:])
    assert layer.num_batches_tracked == 1
    assert torch.equal(torch.get_rng_state(), random)


# Layouts


VIEWS = ("aten.permute.default", "aten.detach.default")


class _Calls(TorchDispatchMode):
    """Records what runs below autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@on_each
@pytest.mark.parametrize("rank", ["2d", "3d"])
@pytest.mark.parametrize("fused", [False, True])
def test_channels_last_stays_so_without_a_copy(rank, fused, backend):
    layout = torch.channels_last if rank == "2d" else torch.channels_last_3d
    ours, theirs = pair(rank, backend=backend)
    x, residual, g = (draw(*SHAPES[rank]).to(memory_format=layout) for _ in range(3))
    inputs = [x]
    layer = ours
    if fused:
        layer = getattr(nn, f"BatchNormAct{rank}")(C, dtype=torch.float64, device=DEVICE)
        layer.backend = backend
        layer.load_state_dict(ours.state_dict())
        inputs.append(residual)
    leaves = [t.detach().requires_grad_() for t in inputs]
    with _Calls() as calls:
        y = layer(*leaves)
        gradients = torch.autograd.grad(y, [*leaves, *layer.parameters()], g)
    suffix = "default" if backend == "native" else backend
    ops = [f"reg_kernels.{name}.{suffix}" for name in ("batch_norm", "batch_norm_backward")]
    assert [n for n in calls.names if "reg_kernels" in n] == ops
    if backend == "native":  # the others run torch's operations inside
        assert not set(calls.names) - {*ops, *VIEWS}
    for t in (y, *gradients[: len(inputs)]):
        assert t.stride() == x.stride()
    if not fused:
        assert_close([y.detach(), *gradients], step(theirs, x, g=g))
    layer.eval()
    with _Calls() as calls:
        assert layer(*leaves).stride() == x.stride()
    op = f"reg_kernels.batch_norm_inference.{suffix}"
    assert [n for n in calls.names if "reg_kernels" in n] == [op]
    # The backward's statistics, a few numbers a channel, are made at once.
    small = ("aten._to_copy.default", "aten.add.Tensor", "aten.rsqrt.default")
    assert backend != "native" or not set(calls.names) - {op, *VIEWS, *small}


def _channels_last(x):
    return x.to(memory_format=torch.channels_last)


def _misaligned(x):
    return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": _channels_last,
    "misaligned": _misaligned,
    "misaligned channels_last": lambda x: _misaligned(x.movedim(1, -1)).movedim(-1, 1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "strided channels_last": lambda x: _channels_last(x.repeat_interleave(2, -2))[..., ::2, :],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "channel slice": lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
}


@on_each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_input", LAYOUTS)
def test_layouts(of_input, training, backend):
    ours, theirs = (layer.train(training) for layer in pair("2d", backend=backend))
    x = LAYOUTS[of_input](draw(3, C, 5, 3))
    expected = LAYOUTS[of_input](x.clone())
    for of_gradient in LAYOUTS if backend == "native" else ("channels_last", "expanded"):
        g = LAYOUTS[of_gradient](draw(3, C, 5, 3))
        assert_close(step(ours, x, g=g), step(theirs, x, g=g))
    assert torch.equal(x, expected)  # read only


@pytest.mark.parametrize("of_residual", LAYOUTS)
@pytest.mark.parametrize("of_input", ["contiguous", "channels_last", "strided"])
def test_layouts_of_the_residual(of_input, of_residual):
    _, theirs = pair("2d")
    layer = nn.BatchNormAct2d(C, dtype=torch.float64, device=DEVICE)
    layer.load_state_dict(theirs.state_dict())
    x, r = LAYOUTS[of_input](draw(3, C, 5, 3)), LAYOUTS[of_residual](draw(3, C, 5, 3))

    def chain(x, r):
        return TF.relu(theirs(x) + r)

    chain.parameters = theirs.parameters
    assert_close(step(layer, x, r), step(chain, x, r))


@on_each
def test_channel_values_of_any_stride(backend):
    ours, theirs = pair("2d", backend=backend)
    for layer in (ours, theirs):
        for name, values in dict(layer.named_buffers()).items():
            if values.dim():
                setattr(layer, name, torch.stack((values, values), 1)[:, 1])
        layer.weight = torch.nn.Parameter(torch.stack((layer.weight, layer.weight), 1)[:, 0])
        assert not layer.weight.is_contiguous()
    for _ in range(2):
        x = draw(*SHAPES["2d"])
        assert_close(step(ours, x), step(theirs, x))
        assert_same_state(ours, theirs)


def test_odd_sizes():
    for shape in ((2, 3), (33, 1), (2, 129), (257, 3), (3, 7, 1), (1, 3, 2), (5, 3, 259)):
        ours, theirs = pair("1d", channels=shape[1])
        x = draw(*shape)
        # Of two values a channel the gradient is what is left of a near cancellation.
        assert_close(step(ours, x), step(theirs, x), 1e-10)
        assert_same_state(ours, theirs)


# Training


def test_a_training_loop_is_torchs():
    def model(library):
        torch.manual_seed(3)
        return torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 6, 3), library.BatchNorm2d(6), torch.nn.ReLU()),
            *(torch.nn.Flatten(2), library.BatchNorm1d(6, momentum=None), torch.nn.Flatten()),
            *(torch.nn.Linear(6 * 36, 4), library.BatchNorm1d(4, affine=False)),
        ).to(DEVICE, torch.float64)

    ours, theirs = model(nn), model(torch.nn)
    batches = [(draw(5, 3, 8, 8), torch.randint(4, (5,), device=DEVICE)) for _ in range(20)]
    for m in (ours, theirs):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
        for x, target in batches:
            optimizer.zero_grad()
            TF.cross_entropy(m(x), target).backward()
            optimizer.step()
    assert_same_state(ours, theirs, 1e-10)


def test_convert_and_revert():
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, C, 3), torch.nn.BatchNorm2d(C, momentum=None), torch.nn.ReLU()),
        *(torch.nn.Flatten(2), torch.nn.BatchNorm1d(C, affine=False)),
    ).to(DEVICE, torch.float64)
    theirs = copy.deepcopy(model)
    ours = reg_kernels.convert(model, inplace=True, backend="reference")
    assert [type(m) for m in (ours[1], ours[4])] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert repr(ours) == repr(theirs)
    x = draw(4, 3, 6, 6)
    for _ in range(2):
        assert_close(step(ours, x), step(theirs, x))
    assert_same_state(ours, theirs)
    theirs.load_state_dict(ours.state_dict())
    back = reg_kernels.revert(ours)
    assert [type(m) for m in (back[1], back[4])] == [torch.nn.BatchNorm2d, torch.nn.BatchNorm1d]
    assert "backend" not in back[1].__dict__
    assert_close(step(back, x), step(theirs, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    layers = pair("2d")
    x, results = draw(*SHAPES["2d"]), []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = checkpoint(lambda x, f=layer: f(x).exp(), leaf, use_reentrant=use_reentrant)
        y.sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    assert_close(*results)
    assert_same_state(*layers)  # moved twice, as torch's


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(use_reentrant):
    layer = nn.BatchNormAct2d(C, activation=None, drop=0.5).to(DEVICE)
    x = draw(*SHAPES["2d"], dtype=torch.float32).requires_grad_()
    residual = torch.zeros_like(x).requires_grad_()
    y = checkpoint(layer, x, residual, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.where(y == 0, 0.0, 2.0))
    assert 0 < (y == 0).sum() < y.numel()


def test_hooks():
    seen = []
    layers = pair("2d")
    for layer in layers:
        log = []
        seen.append(log)
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        layer.register_forward_hook(lambda module, inputs, output: output + 1)
        layer.register_full_backward_pre_hook(lambda module, g, log=log: log.append(g[0]))
        layer.register_full_backward_hook(lambda module, gi, go, log=log: log.extend((*gi, *go)))
    x = draw(*SHAPES["2d"])
    assert_close(*(step(layer, x) for layer in layers))
    assert len(seen[0]) == 3
    assert_close(*seen)


@pytest.mark.parametrize("training", [True, False])
def test_functional_call(training):
    results, layers = [], pair("2d", {"momentum": None})
    state = {
        name: values.clone().requires_grad_(name in ("weight", "bias"))
        for name, values in filled(copy.deepcopy(layers[0])).state_dict().items()
    }
    x = draw(*SHAPES["2d"])
    for layer in layers:
        layer.train(training)
        before = copy.deepcopy(layer.state_dict())
        given = {
            name: values.detach().clone().requires_grad_(values.requires_grad)
            for name, values in state.items()
        }
        y = torch.func.functional_call(layer, given, (x,))
        gradients = torch.autograd.grad(y.square().sum(), [given["weight"], given["bias"]])
        results.append([y.detach(), *gradients, *(v.detach() for v in given.values())])
        assert_close(layer.state_dict().values(), before.values(), 0)  # what was given moves
        assert given["num_batches_tracked"] == int(training)
    assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_func_transforms(training, momentum):
    x, tangent, results = draw(*SHAPES["2d"]), draw(*SHAPES["2d"]), []
    for layer in pair("2d", {"momentum": momentum}):
        layer.train(training)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def call(parameters, x, layer=layer):
            # A transform may not write to what it was not given.
            buffers = {name: b.clone() for name, b in layer.named_buffers()}
            y = torch.func.functional_call(layer, {**parameters, **buffers}, (x,))
            return y.square().sum(), buffers

        gradients, buffers = torch.func.grad(call, (0, 1), has_aux=True)(parameters, x)
        y, dy, _ = torch.func.jvp(lambda x: call(parameters, x), (x,), (tangent,), has_aux=True)  # noqa: B023
        results.append([*gradients[0].values(), gradients[1], *buffers.values(), y, dy])
        assert buffers["num_batches_tracked"] == int(training)
    assert_close(*results)


def test_gradients_a_sample_by_vmap():
    results = []
    x = draw(6, *SHAPES["2d"])
    for layer in pair("2d"):
        layer.eval()
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).cos().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        results.append(list(gradients.values()))
    assert_close(*results)
    assert results[0][0].shape == (6, C)


def test_two_layers_in_one_graph_and_a_second_backward():
    ours, theirs = pair("2d")
    results = []
    for layer in (ours, theirs):
        x = draw(*SHAPES["2d"]) * 0 + torch.arange(6.0, device=DEVICE).sin().view(3, 2)
        x = x.requires_grad_()
        y = layer(layer(x * torch.linspace(1, 2, 4, device=DEVICE).view(4, 1, 1, 1)))
        first = torch.autograd.grad(y.cos().sum(), [x, *layer.parameters()], retain_graph=True)
        second = torch.autograd.grad(y.cos().sum(), [x, *layer.parameters()])
        assert_close(first, second, 0)
        results.append(first)
    assert_close(*results, 1e-8)


# Compilation


@pytest.fixture
def counted():
    """torch.compile(fullgraph=True), and how many programs that made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counters = []

    def compiled(function, backend="inductor"):
        counters.append(CompileCounterWithBackend(backend))
        return torch.compile(function, fullgraph=True, backend=counters[-1])

    yield compiled, counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("rank", "momentum", "by"),
    [
        ("1d", 0.1, "aot_eager"),
        ("1d", None, "aot_eager"),
        ("2d", 0.1, "aot_eager"),
        ("2d", None, "inductor"),
        ("3d", None, "aot_eager"),
    ],
)
def test_compiled_training_is_torchs(counted, rank, momentum, by):
    compile_by, counters = counted
    ours, theirs = pair(rank, {"momentum": momentum})
    compiled = compile_by(ours, by)
    for _ in range(4):
        x = draw(*SHAPES[rank])
        assert_close(step(compiled, x), step(theirs, x))
    assert_same_state(ours, theirs)
    assert ours.num_batches_tracked == 4
    assert counters[0].frame_count == 1  # the counter is a tensor, no constant
    compiled.eval()
    theirs.eval()
    assert_close(step(compiled, x), step(theirs, x))


def test_compiled_channels_last_and_other_batches(counted):
    compile_by, counters = counted
    ours, theirs = pair("2d")
    compiled = compile_by(ours, "aot_eager")
    for n in (4, 6, 7, 9):
        x = draw(n, C, 4, 3).to(memory_format=torch.channels_last)
        results = step(compiled, x)
        assert results[0].stride() == results[1].stride() == x.stride()
        assert_close(results, step(theirs, x))
    assert_same_state(ours, theirs)
    assert counters[0].frame_count <= 2  # the second for any batch


def test_compiled_fused_layer_draws_afresh(counted):
    compile_by, counters = counted
    layer = nn.BatchNormAct2d(C, momentum=None, drop=0.5, dtype=torch.float64, device=DEVICE)
    filled(layer)
    with torch.no_grad():
        layer.bias.fill_(20)  # relu passes everything: what is 0 was dropped
    compiled = compile_by(layer)
    x, r = draw(*SHAPES["2d"]), draw(*SHAPES["2d"])
    torch.manual_seed(1)
    first, second = step(compiled, x, r), step(compiled, x, r)
    torch.manual_seed(1)
    assert_close(step(compiled, x, r), first, 0)
    assert not torch.equal(first[0] == 0, second[0] == 0)
    assert counters[0].frame_count == 1
    assert layer.num_batches_tracked == 3
    plain = copy.deepcopy(layer)
    plain.drop = 0.0
    m = torch.where(first[0] == 0, 0.0, 2.0).to(torch.float64)
    chain = lambda x, r: plain(x, r) * m  # noqa: E731
    chain.parameters = plain.parameters
    assert_close(first, step(chain, x, r))  # the backward had the same mask
    compiled.eval()
    assert (compiled(x, r) != 0).all()


# The fused layers


def chain_of(layer, activation, drop=0.0):
    """The chain of a fused layer one by one, with dropout's own draws."""

    def chain(x, residual=None):
        z = layer(x) if residual is None else layer(x) + residual
        return F.dropout(ACTIVATIONS[activation](z), drop, layer.training)

    chain.parameters = layer.parameters
    return chain


def fused_pair(rank, activation, drop=0.0, backend=None, **arguments):
    _, theirs = pair(rank, arguments)
    fused = getattr(nn, f"BatchNormAct{rank}")(
        C,
        **{"dtype": torch.float64, "device": DEVICE, **arguments},
        activation=activation,
        negative_slope=0.2,
        drop=drop,
        backend=backend,
    )
    fused.load_state_dict(theirs.state_dict())
    return fused, theirs


@on_each
@activations
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_fused_layer_is_the_chain(activation, residual, drop, layout, backend):
    fused, theirs = fused_pair("2d", activation, drop, backend)
    chain = chain_of(theirs, activation, drop)
    inputs = [LAYOUTS[layout](draw(*SHAPES["2d"])) for _ in range(1 + residual)]
    for seed in (1, 2):
        torch.manual_seed(seed)
        results = step(fused, *inputs)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = step(chain, *inputs)
        assert torch.equal(results[0] == 0, expected[0] == 0)
        assert_close(results, expected)
        assert torch.equal(torch.get_rng_state(), after)  # draws as much as dropout
    assert_same_state(fused, theirs)
    fused.eval()
    theirs.eval()
    before = torch.get_rng_state()
    assert_close(step(fused, *inputs), step(chain, *inputs))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(fused, theirs)


@each
@options
def test_options_of_the_fused_layer(rank, arguments):
    fused, theirs = fused_pair(rank, "silu", **arguments)
    chain = chain_of(theirs, "silu")
    shapes = (SHAPES[rank], FLAT) if rank == "1d" else (SHAPES[rank],)
    for shape in shapes:
        x, r = draw(*shape), draw(*shape)
        assert_close(step(fused, x, r), step(chain, x, r))
        assert_same_state(fused, theirs)
    fused.eval()
    theirs.eval()
    assert_close(step(fused, x, r), step(chain, x, r))


def test_evaluation_by_the_batchs_statistics_drops_nothing():
    fused, theirs = fused_pair("2d", "relu", 0.5, track_running_stats=False)
    fused.eval()
    theirs.eval()
    x, before = draw(*SHAPES["2d"]), torch.get_rng_state()
    assert_close(step(fused, x), step(chain_of(theirs, "relu", 0.5), x))
    assert torch.equal(torch.get_rng_state(), before)


@on_each
@pytest.mark.parametrize("drop", [0.0, 1.0, 2**-18])
def test_probabilities_that_need_no_draw(drop, backend):
    fused, theirs = fused_pair("2d", "relu", drop, backend)
    x = draw(*SHAPES["2d"])
    before = torch.get_rng_state()
    results, expected = step(fused, x), step(chain_of(theirs, "relu", drop), x)
    assert_close(results, expected)
    if drop == 1.0:
        assert all((t == 0).all() for t in results)
    assert drop == 2**-18 or torch.equal(torch.get_rng_state(), before)


def test_the_residual_may_be_the_input():
    fused, theirs = fused_pair("2d", "gelu")
    results = []
    for layer in (fused, chain_of(theirs, "gelu")):
        x = torch.linspace(-2, 2, 4 * C * 6, dtype=torch.float64, device=DEVICE)
        x = x.view(SHAPES["2d"]).requires_grad_()
        y = layer(x, x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
    assert_close(*results)


def test_dropout_beside_nan_and_infinity():
    fused, theirs = fused_pair("2d", "relu", 0.5)
    x = draw(*SHAPES["2d"])
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[1, 2] = float("nan"), float("inf"), -float("inf")
    torch.manual_seed(1)
    y = fused(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, chain_of(theirs, "relu", 0.5)(x), equal_nan=True)
    assert y.isnan().flatten(2).all(-1).all(0).tolist() == [True, True, True, False, False]


def test_repr_of_the_fused_layers():
    for rank in SHAPES:
        plain = repr(getattr(torch.nn, f"BatchNorm{rank}")(C))
        text = repr(getattr(nn, f"BatchNormAct{rank}")(C, drop=0.25))
        assert text.startswith(plain.replace("BatchNorm", "BatchNormAct")[:-1])
        assert text.endswith("activation='relu', drop=0.25)")
    leaky = nn.BatchNormAct1d(C, activation="leaky_relu", negative_slope=0.3)
    assert repr(leaky).endswith("activation='leaky_relu', drop=0.0, negative_slope=0.3)")
    assert isinstance(leaky, torch.nn.BatchNorm1d)


@each
def test_bad_arguments_of_the_fused_layers(rank):
    cls = getattr(nn, f"BatchNormAct{rank}")
    for activation in ("tanh", 1, ["relu"]):
        with pytest.raises(
            ValueError, match=f"{cls.__name__}: activation must be one of None, 're"
        ):
            cls(C, activation=activation)
    for drop in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"{cls.__name__}: drop must be in \[0, 1\], got"):
            cls(C, drop=drop)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("activation", "tanh", ValueError),
        ("drop", 2.0, ValueError),
        ("residual", None, RuntimeError),
    ],
)
def test_bad_calls_of_the_fused_layer_change_nothing(attribute, value, error, training):
    layer = nn.BatchNormAct2d(C, drop=0.5).train(training)
    if attribute == "drop" and not training:
        pytest.skip("evaluation has no dropout")
    residuals = [None]
    if attribute == "residual":
        residuals = [X[:2], X.double(), X.to("meta"), X[..., :1]]
    else:
        setattr(layer, attribute, value)
    before, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    for residual in residuals:
        with pytest.raises(error, match=f"batch_norm_act: {attribute} must be"):
            layer(X, residual)
    assert_close(layer.state_dict().values(), before.values(), 0)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("residual", [False, True])
@activations
def test_saved_tensors(activation, residual, drop, dtype, training):
    shape = (4, 6, 5, 3)
    layer = nn.BatchNormAct2d(6, activation=activation, drop=drop).to(DEVICE).train(training)
    x, r = (draw(*shape, dtype=dtype).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x, r if residual else None)

    def place(t):
        return t.untyped_storage().data_ptr()

    own = {place(t): t for t in (x, r, *layer.parameters())}
    rest = {place(t): t.untyped_storage().nbytes() for t in kept if place(t) not in own}
    dropped = training and drop > 0
    gated = dropped or (training and residual and activation in ("relu", "leaky_relu"))
    allowed = (x.numel() // 8 + 6 if gated else 0) + 16 * 6
    assert sum(rest.values()) <= allowed + (16 if dropped else 0)
    # The residual where its sum's curve is needed again, or a sign that the gate has no room for.
    needed = activation in ("silu", "gelu") or (activation == "leaky_relu" and dropped)
    if not training:
        needed = activation is not None
    assert (place(r) in {place(t) for t in kept}) == (residual and needed)
