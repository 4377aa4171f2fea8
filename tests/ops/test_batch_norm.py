"""BatchNorm and its chain: values, gradients, registration, compilation and torch's semantics."""

import itertools

import pytest
import torch
import torch.nn.functional as TF
from torch.library import opcheck

from reg_kernels import functional as F
from reg_kernels._activation import NUMBERS

from support import DEVICE, implementations, rng_state

INTERPRETED = DEVICE == "cpu"
on_each = pytest.mark.parametrize("backend", implementations())
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])

P = 0.3


def arguments(shape=(4, 6, 5, 3), layout=torch.contiguous_format, dtype=torch.float32):
    """(input, running_mean, running_var, weight, bias), the running ones at their start."""
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if len(shape) == 4:
        x = x.to(memory_format=layout)
    channels = (shape[1],)
    return (
        x,
        *(torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)),
        *(torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)),
    )


# Values and gradients


@on_each
@layouts
@pytest.mark.parametrize("activation", NUMBERS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("drop", [0.0, P, 1.0])
def test_the_chain_is_its_parts(backend, layout, activation, residual, drop):
    x, mean, var, weight, bias = arguments(layout=layout)
    added = torch.randn_like(x) if residual else None
    options = {"activation": activation, "negative_slope": 0.2}
    y = F.batch_norm_act(
        *(x, mean, var, weight, bias, added, True),
        **(options | {"drop": drop, "rng_state": rng_state(), "backend": backend}),
    )
    parts = [torch.zeros_like(mean), torch.ones_like(var)]
    z = TF.batch_norm(x, *parts, weight, bias, True)
    z = z if added is None else z + added
    z = {
        None: lambda z: z,
        "relu": TF.relu,
        "leaky_relu": lambda z: TF.leaky_relu(z, 0.2),
        "silu": TF.silu,
        "gelu": TF.gelu,
    }[activation](z)
    expected = F.dropout(z, drop, rng_state=rng_state(), backend="reference")
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([mean, var], parts)
    # One mask: what is dropped is dropped in both.
    ones = F.dropout(torch.ones_like(x), drop, rng_state=rng_state(), backend="reference")
    assert (y[ones == 0] == 0).all()


@on_each
def test_masks_follow_torchs_generator(backend):
    x, *rest = arguments((4, 6))
    torch.manual_seed(5)
    a = F.batch_norm_act(x, *rest, training=True, drop=0.5, activation=None, backend=backend)
    b = F.batch_norm_act(x, *rest, training=True, drop=0.5, activation=None, backend=backend)
    torch.manual_seed(5)
    again = F.batch_norm_act(x, *rest, training=True, drop=0.5, activation=None, backend=backend)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.5, backend=backend)
    assert torch.equal(a, again)
    assert torch.equal(a == 0, mask == 0)
    assert not torch.equal(a == 0, b == 0)


@on_each
@layouts
def test_a_part_of_a_batch_gets_its_part_of_the_mask(backend, layout):
    """By each way that a mask is drawn: groups of it that begin within the part, and elsewhere."""
    for shape in ((6, 6, 5, 3), (4, 8, 4, 6), (3, 2, 300, 1)):
        x, *rest = arguments(shape, layout)
        given = {"training": True, "drop": P, "rng_state": rng_state(), "backend": backend}
        mask = F.dropout(torch.ones_like(x), P, rng_state=rng_state(), backend=backend) == 0
        for first, last in ((0, 2), (2, 3), (1, shape[0])):
            part = x[first:last]
            y = F.batch_norm_act(
                *(part, *rest), activation=None, element_offset=first * x[0].numel(), **given
            )
            assert torch.equal(y == 0, mask[first:last])


def test_no_draw_where_nothing_is_random():
    x, *rest = arguments((4, 6))
    before = torch.get_rng_state()
    F.batch_norm(x, *rest, training=True)
    F.batch_norm_act(x, *rest, training=True, drop=1.0)
    F.batch_norm_act(x, *rest, training=True, drop=P, rng_state=rng_state())
    F.batch_norm_act(x, *rest, training=False, drop=P)
    F.batch_norm_act(x[:0], *rest, training=True, drop=P)
    assert torch.equal(torch.get_rng_state(), before)


@on_each
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_with_float_parameters(backend, layout, dtype):
    x, mean, var, weight, bias = arguments(layout=layout, dtype=dtype)
    x.requires_grad_()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    y = F.batch_norm(x, mean, var, *parameters, True, backend=backend)
    wide = x.detach().float().requires_grad_()
    statistics = [torch.zeros_like(mean), torch.ones_like(var)]
    z = TF.batch_norm(wide, *statistics, *parameters, True)
    assert y.dtype == dtype and mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), z, rtol=2**-6, atol=2**-7)
    torch.testing.assert_close([mean, var], statistics)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *parameters], g)
    theirs = torch.autograd.grad(z, [wide, *parameters], g.float())
    assert [t.dtype for t in ours] == [dtype, torch.float32, torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-6, atol=2**-6)


@on_each
@pytest.mark.parametrize(
    "wanted", [c for n in range(1, 5) for c in itertools.combinations("xwbr", n)]
)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_any_of_the_inputs(backend, wanted, training):
    x, mean, var, weight, bias = arguments((3, 2, 4), dtype=torch.float32)
    tensors = {"x": x, "w": weight, "b": bias, "r": torch.randn_like(x)}
    for name in wanted:
        tensors[name].requires_grad_()
    y = F.batch_norm_act(
        *(x, mean, var, weight, bias, tensors["r"], training), activation="silu", backend=backend
    )
    z = TF.batch_norm(x, mean, var, weight, bias, training)
    z = TF.silu(z + tensors["r"])
    g = torch.randn_like(y)
    leaves = [tensors[name] for name in wanted]
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(z, leaves, g), rtol=1e-4, atol=1e-5
    )


@on_each
def test_gradients_in_any_layout(backend):
    x, mean, var, weight, bias = arguments(layout=torch.channels_last)
    x.requires_grad_()
    y = F.batch_norm_act(x, mean, var, weight, bias, training=True, backend=backend)
    for g in (
        torch.randn(4, 6, 5, 3, device=DEVICE),
        torch.randn(4, 6, 5, 1, device=DEVICE).expand(4, 6, 5, 3),
        torch.randn(3, 5, 6, 4, device=DEVICE).permute(3, 2, 1, 0),
    ):
        (a,) = torch.autograd.grad(y, x, g, retain_graph=True)
        (b,) = torch.autograd.grad(
            y, x, g.contiguous(memory_format=torch.channels_last), retain_graph=True
        )
        assert torch.equal(a, b)


@on_each
def test_a_residual_that_is_the_input(backend):
    x = torch.randn(3, 2, 2, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)

    def function(x):
        return F.batch_norm_act(x, None, None, residual=x, training=True, backend=backend)

    if backend == "triton" and INTERPRETED:
        y = function(x)
        z = TF.relu(TF.batch_norm(x, None, None, training=True) + x)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(z.square().sum(), x)
        )
        return
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@on_each
def test_third_derivatives(backend):
    x = torch.randn(4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def third(function):
        y = function(x).pow(3).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = y.square().sum()
        return y

    def formula(x):  # torch's batch_norm has another third derivative, and the formula does not
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + 0.1).sqrt()

    ours = third(lambda x: F.batch_norm(x, None, None, training=True, eps=0.1, backend=backend))
    torch.testing.assert_close(ours, third(formula))


# Torch's semantics


@on_each
def test_running_statistics_by_momentum(backend):
    for momentum in (0.1, 0.0, 1.0):
        x, mean, var, weight, bias = arguments()
        theirs = [mean.clone(), var.clone()]
        for _ in range(3):
            F.batch_norm(x, mean, var, weight, bias, True, momentum, backend=backend)
            TF.batch_norm(x, *theirs, weight, bias, True, momentum)
            x = x * 2 + 1
        torch.testing.assert_close([mean, var], theirs)


@on_each
def test_cumulative_average(backend):
    counter = torch.tensor(0, device=DEVICE)
    x, mean, var, *_ = arguments()
    batches = [x, x * 2 + 1, x * 3 - 2]
    for batch in batches:
        F.batch_norm(
            *(batch, mean, var), training=True, momentum=None, num_batches_tracked=counter,
            backend=backend,
        )  # fmt: skip
    assert counter == 3
    stacked = torch.stack([b.transpose(0, 1).flatten(1) for b in batches])
    torch.testing.assert_close(mean, stacked.mean((0, 2)))
    torch.testing.assert_close(var, stacked.var(2).mean(0))


@on_each
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(backend, training):
    x, mean, var, weight, bias = arguments()
    counter = torch.tensor(5, device=DEVICE)
    tensors = [x[:0].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = F.batch_norm_act(
        *(tensors[0], mean, var, *tensors[1:]), training=training, num_batches_tracked=counter,
        backend=backend,
    )  # fmt: skip
    assert y.shape == (0, 6, 5, 3)
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert all((g == 0).all() for g in gradients)
    assert (mean == 0).all() and (var == 1).all()
    assert counter == (6 if training else 5)
    assert F.batch_norm(x[:, :0], None, None, training=True, backend=backend).shape == (4, 0, 5, 3)


@on_each
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)])
def test_the_registered_op_of_nothing_has_a_gradient(backend, shape):
    x, r = (torch.empty(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    w, b = (torch.ones(shape[1], device=DEVICE, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros_like(w), torch.ones_like(w)
    op = overload_of("batch_norm_inference", backend)
    y = op(x, w, b, r, mean.detach(), var.detach(), 1e-5, NUMBERS["leaky_relu"], 0.01)
    leaves = (x, r, w, b)
    for tensor, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_versions_count_what_is_written():
    x, mean, var, *_ = arguments()
    counter = torch.tensor(0)
    before = [t._version for t in (mean, var, counter)]
    F.batch_norm(x, mean, var, training=True, num_batches_tracked=counter)
    F.batch_norm(x.requires_grad_(), mean, var, training=True, num_batches_tracked=counter)
    assert [t._version - b for t, b in zip((mean, var, counter), before, strict=True)] == [2, 2, 2]
    y = F.batch_norm(x, mean, var)
    expected = (var + 1e-5).rsqrt()
    var.add_(1)  # as a training step between a frozen forward and its backward does
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, expected.view(1, -1, 1, 1).expand_as(x))


def test_inference_mode_and_tensors():
    with torch.inference_mode():
        x, mean, var, weight, bias = arguments()
        y = F.batch_norm_act(x, mean, var, weight, bias, training=True)
        torch.testing.assert_close(y, TF.relu(TF.batch_norm(x, None, None, weight, bias, True)))
    assert (mean != 0).all()


def test_fx_proxies_pass():
    graph = torch.fx.symbolic_trace(lambda x: F.batch_norm_act(x, None, None, training=True))
    assert any(node.target is F.batch_norm_act for node in graph.graph.nodes)
    assert graph(torch.ones(10, 2)).shape == (10, 2)


# Bad input


def torch_error(*args, **options):
    try:
        TF.batch_norm(*args, **options)
    except Exception as error:
        return type(error)
    raise AssertionError("torch accepts this")


ONES = torch.ones(6)
BAD = [
    ({"input": torch.ones(1, 6)}, "expected more than 1 value per channel"),
    ({"eps": 0.0}, "eps must be positive in training, got 0.0"),
    ({"eps": -1.0, "training": False}, "eps must be 0 or above, got -1.0"),
    ({"weight": torch.ones(4)}, r"weight must have shape \(6,\), one value a channel, got \(4,\)"),
    ({"bias": torch.ones(7)}, r"bias must have shape"),
    ({"running_mean": torch.ones(2)}, "running_mean must have shape"),
    ({"running_var": torch.ones(2)}, "running_var must have shape"),
    ({"running_mean": None}, "running_mean and running_var must be given together"),
    ({"running_mean": None, "running_var": None, "training": False}, "must be given for evaluat"),
    ({"input": torch.ones(3, 6, dtype=torch.int64)}, "input must be one of float64"),
    ({"input": torch.ones(3, 6, dtype=torch.complex64)}, "input must be one of float64"),
    ({"input": torch.ones(3, 6).double()}, "must be float64 for an input of float64, got float32"),
    ({"weight": torch.ones(6).half()}, "weight must be float32 for an input of float32"),
    ({"momentum": None}, "momentum must be a float, or None together with"),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's error types differ between devices")
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_raises_torchs_type_and_changes_nothing(change, message):
    options = {
        "input": torch.randn(3, 6), "running_mean": torch.zeros(6), "running_var": torch.ones(6),
        "weight": ONES.clone(), "bias": ONES.clone(), "training": True,
    } | change  # fmt: skip
    counter = torch.tensor(3)
    before = torch.get_rng_state()
    expected = torch_error(**options)
    more = {} if options.get("momentum", 0.1) is None else {"num_batches_tracked": counter}
    with pytest.raises(expected, match=message):
        F.batch_norm_act(**options, drop=0.5, **more)
    with pytest.raises(expected, match=f"batch_norm: .*{message}"):
        F.batch_norm(**options, **more)
    assert counter == 3
    assert (
        options["running_mean"] is None
        or options["running_mean"].numel() != 6
        or ((options["running_mean"] == 0).all())
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(6)}, IndexError, "at least 2 dimensions"),
        ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"weight": torch.ones(6, device="meta")}, RuntimeError, "weight must be on the input's"),
        ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu'"),
        ({"activation": 1}, ValueError, "activation must be one of"),
        ({"drop": 1.5}, ValueError, r"drop must be in \[0, 1\], got 1.5"),
        ({"drop": float("nan")}, ValueError, r"drop must be in \[0, 1\]"),
        ({"residual": torch.ones(3, 5)}, RuntimeError, "residual must be like the input"),
        ({"residual": torch.ones(3, 6).double()}, RuntimeError, "residual must be like the input"),
        ({"backend": "cuda"}, ValueError, "backend must be one of native, triton, reference"),
        ({"element_offset": -1}, ValueError, r"element_offset must be in \[0, 2\^62\), got -1"),
        ({"element_offset": 2**62}, ValueError, r"element_offset must be in \[0, 2\^62\)"),
        ({"element_offset": 1.5}, TypeError, "element_offset must be an integer, got float"),
        ({"rng_state": torch.ones(3)}, RuntimeError, "rng_state must be an int64 tensor"),
        ({"residual": 1.0}, TypeError, "residual must be a Tensor or None, got float"),
        ({"momentum": "a"}, TypeError, "momentum must be a float or None, got str"),
        ({"num_batches_tracked": torch.ones(2)}, RuntimeError, "num_batches_tracked must be one"),
    ],
)
def test_bad_options_change_nothing(change, error, message):
    x, mean, var, *_ = arguments((3, 6))
    x, mean, var = x.cpu(), mean.cpu(), var.cpu()
    before = torch.get_rng_state()
    with pytest.raises(error, match=f"batch_norm_act: .*{message}|{message}"):
        F.batch_norm_act(
            **({"input": x, "drop": 0.5} | change),
            running_mean=mean,
            running_var=var,
            training=True,
        )
    assert (mean == 0).all() and (var == 1).all()
    assert torch.equal(torch.get_rng_state(), before)


# Registration and compilation


def overload_of(name, backend):
    packet = getattr(torch.ops.reg_kernels, name)
    return getattr(packet, "default" if backend == "native" else backend)


@on_each
def test_opcheck_of_the_twins_by_numbers(backend):
    x, mean, var, weight, bias = arguments((2, 3, 2, 2), torch.contiguous_format)
    numbers = torch.tensor([0.1, 1e-5, 0.1, P], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    leaky_relu = NUMBERS["leaky_relu"]
    how = ([mean, var], 0.0, 0.0, leaky_relu, 0.0, 0.5, rng_state(), 0, False, None, None)
    opcheck(overload_of("batch_norm_by_numbers", backend), (*leaves, None, *how, numbers))
    numbers = torch.tensor([1e-5, 0.1, 0.0], dtype=torch.float64)
    opcheck(
        overload_of("batch_norm_inference_by_numbers", backend),
        (*leaves, None, mean, var, 0.0, leaky_relu, 0.0, numbers),
    )


@pytest.fixture
def counted():
    """torch.compile(fullgraph=True) by inductor, and how many programs that made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def test_compiled_draws_are_fresh_and_seeded(counted):
    compiled, counter = counted
    x, *rest = arguments((40, 30))
    function = compiled(lambda x: F.batch_norm_act(x, *rest, training=True, drop=0.5))
    torch.manual_seed(1)
    a, b = function(x), function(x)
    torch.manual_seed(1)
    assert torch.equal(function(x), a)
    assert not torch.equal(a, b)
    assert counter.frame_count == 1


def test_compile_recompiles_at_most_once_as_the_batch_changes(counted):
    compiled, counter = counted
    _, *rest = arguments((2, 6, 5, 3))
    function = compiled(lambda x: F.batch_norm_act(x, *rest, training=True))
    for n in (8, 9, 10, 16):
        assert function(torch.randn(n, 6, 5, 3)).shape == (n, 6, 5, 3)
    assert counter.frame_count <= 2


def test_activation_checkpointing_moves_the_statistics_as_torchs_does():
    # Recomputing runs the layer twice: torch's own moves its statistics twice as well.
    x, mean, var, *_ = arguments((8, 6))
    x.requires_grad_()
    theirs = [mean.clone(), var.clone()]
    torch.utils.checkpoint.checkpoint(
        lambda x: F.batch_norm_act(x, mean, var, training=True, drop=P).exp(),
        x,
        use_reentrant=False,
    ).sum().backward()
    torch.utils.checkpoint.checkpoint(
        lambda x: TF.batch_norm(x, *theirs, training=True).exp(), x, use_reentrant=False
    ).sum().backward()
    torch.testing.assert_close([mean, var], theirs)


def test_mutation_of_running_statistics_that_were_saved():
    x, mean, var, *_ = arguments((4, 3, 2))
    before = mean.clone()
    w = torch.ones(3, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        product = (mean * w).sum()
        F.batch_norm(x, mean, var, training=True)
        (gradient,) = torch.autograd.grad(product, w)
    assert torch.equal(gradient, before)
    assert not torch.equal(mean, before)
