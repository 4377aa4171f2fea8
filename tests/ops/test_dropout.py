"""Dropout: values, masks, gradients, registration, compilation and torch's semantics."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as TF
from torch.library import opcheck

from reg_kernels import backends
from reg_kernels import functional as F
from reg_kernels.cases.dropout import P
from reg_kernels.reference.dropout import multipliers, rate

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas, rng_state

IMPLEMENTATIONS = implementations()
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)


# Values and masks


@pytest.mark.skipif(not isas(), reason="the native library was not built")
@pytest.mark.parametrize("p", [2**-16, 1e-3, 0.1, 0.3, 0.5, 0.75, 0.999, 1 - 2**-16, 1 - 2**-18])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_value_of_16_bits_in_each_instruction_set(dtype, p):
    # In order, so that there are stretches of plain numbers alone and of others alone, and mixed.
    from reg_kernels import _C

    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    mixed = words[torch.randperm(words.numel(), generator=torch.Generator().manual_seed(0))]
    ordinary = mixed.view(dtype).abs()
    ordinary = mixed[(ordinary < 0.25) & (ordinary > 2**-13) | (ordinary == 0)]
    x = torch.cat([words, mixed, ordinary]).view(dtype)
    best = _C.isa()
    try:
        bits = []
        for isa in isas():
            _C.set_isa(isa)
            # Nothing is drawn where p rounds to 1, unless the op itself is asked.
            y = torch.ops.reg_kernels.dropout(x, p, rng_state())
            bits.append(y.view(torch.int16))
    finally:
        _C.set_isa(best)
    assert all(torch.equal(bits[0], other) for other in bits[1:])
    truth = F.dropout(x, p, rng_state=rng_state(), backend="reference")
    finite = truth.isfinite()
    assert torch.equal(y[finite], truth[finite])


@pytest.mark.skipif(not isas(), reason="the native library was not built")
@dtypes
def test_streamed_outputs(dtype):
    # Larger than any last-level cache that streams, and an odd length: the bits are the same.
    itemsize = torch.empty(0, dtype=dtype).element_size()
    x = torch.randn(80 * 2**20 // itemsize // 3).repeat(3).to(dtype)[1:]
    y = F.dropout(x, P, rng_state=rng_state(), backend="native")
    parts = [
        F.dropout(part, P, rng_state=rng_state(), element_offset=first, backend="native")
        for first, part in ((i, x[i : i + 999_999]) for i in range(0, x.numel(), 999_999))
    ]
    assert torch.equal(y, torch.cat(parts))
    planes = x[: x.numel() // 1001 // 7 * 1001 * 7].view(-1, 7, 1001)
    streamed = F.dropout1d(planes, P, rng_state=rng_state(), backend="native")
    # In place nothing is streamed.
    plain = F.dropout1d(planes.clone(), P, inplace=True, rng_state=rng_state(), backend="native")
    assert torch.equal(streamed, plain)


def test_threshold_and_scale():
    assert rate(0.5) == (32768, 2.0)
    assert rate(0.1) == (58982, 65536 / 58982)
    assert rate(2**-18) == (65536, 1.0)  # rounds to "keep all"
    assert rate(1 - 2**-18) == (0, 0.0)  # rounds to "keep none"
    for p in (0.01, 0.1, 0.3, 0.5, 0.9, 0.999):
        threshold, scale = rate(p)
        assert math.isclose(threshold / 65536 * scale, 1.0, rel_tol=1e-15)  # E[y] = x


@on_each
@pytest.mark.parametrize("p", [2**-18, 1 - 2**-18, 2**-16, 1 - 2**-16, 0.5])
def test_probabilities_at_the_edge_of_the_grid(backend, p):
    x = torch.linspace(-1, 1, 1000, device=DEVICE)
    y = F.dropout(x, p, rng_state=rng_state(), backend=backend)
    m = multipliers(1000, p, rng_state().to(DEVICE), 0, torch.float32)
    assert torch.equal(y, x * m)


@on_each
@dtypes
def test_nan_inf_and_signed_zero_go_where_torch_sends_them(backend, dtype):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0]
    x = torch.tensor(special * 40, dtype=dtype, device=DEVICE)
    y = F.dropout(x, P, rng_state=rng_state(), backend=backend)
    m = multipliers(x.numel(), P, rng_state().to(DEVICE), 0, torch.float64).to(dtype)
    expected = x * m  # torch's dropout multiplies by its mask
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.equal(torch.signbit(y[finite]), torch.signbit(expected[finite]))


@on_each
def test_channels_are_dropped_whole(backend):
    x = torch.rand(8, 16, 5, 5, device=DEVICE) + 1
    y = F.dropout2d(x, 0.5, rng_state=rng_state(), backend=backend)
    dropped = (y == 0).flatten(2)
    assert torch.equal(dropped.any(-1), dropped.all(-1))
    assert 0 < dropped.float().mean() < 1


# Statistics


@pytest.mark.parametrize("size", [1, 10, 1000, 10**5, 10**7])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_within_four_sigma(size, p):
    repeats = max(1, 2000 // size)
    keep = rate(p)[0] / 65536
    kept = sum(int((F.dropout(torch.ones(size), p) != 0).sum()) for _ in range(repeats))
    n = size * repeats
    assert abs(kept - n * keep) <= 4 * math.sqrt(n * keep * (1 - keep))


def correlation(a, b):
    """Pearson's r, in units of its standard deviation under independence."""
    return float(torch.corrcoef(torch.stack([a.float(), b.float()]))[0, 1]) * math.sqrt(a.numel())


def test_masks_are_uncorrelated():
    n = 1 << 20
    torch.manual_seed(7)
    mask = F.dropout(torch.ones(n), 0.5) != 0
    again = F.dropout(torch.ones(n), 0.5) != 0
    torch.manual_seed(7)
    uniform = torch.rand(n) < 0.5
    pairs = {"call": (mask, again), "torch.rand under the same seed": (mask, uniform)}
    for lag in (1, 2, 4, 7, 8, 16, 32, 256, 1024):
        pairs[f"lag {lag}"] = (mask[:-lag], mask[lag:])
    rows = mask.view(1024, 1024)
    pairs["rows"] = (rows[::2].flatten(), rows[1::2].flatten())
    for lane in range(7):
        lanes = mask.view(-1, 8)
        pairs[f"lanes {lane}, {lane + 1}"] = (lanes[:, lane], lanes[:, lane + 1])
    for what, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 4.5, what


def test_states_that_differ_by_one_are_uncorrelated():
    def mask(seed, offset):
        return F.dropout(torch.ones(1 << 18), 0.5, rng_state=torch.tensor([seed, offset])) != 0

    for other in ((2, 1), (1, 2), (1 + 2**32, 1), (1, 1 + 2**32)):
        assert abs(correlation(mask(1, 1), mask(*other))) < 4.5


# Random state


def test_manual_seed_rules():
    x = torch.ones(1000, device=DEVICE)
    torch.manual_seed(3)
    a, b = F.dropout(x), F.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x), a)
    assert torch.equal(F.dropout(x), b)
    assert not torch.equal(a, b)


def test_no_draw_where_nothing_is_random():
    x = torch.ones(5, device=DEVICE)
    before = torch.get_rng_state()
    F.dropout(x, 0.0)
    F.dropout(x, 1.0)
    F.dropout(x, training=False)
    F.dropout(x[:0])
    F.dropout(x, rng_state=rng_state())
    assert torch.equal(torch.get_rng_state(), before)


# Gradients


@on_each
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_gradient_has_the_forward_mask_whatever_its_layout(backend, layout):
    x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = F.dropout(x, P, rng_state=rng_state(), backend=backend)
    g = torch.randn(2, 3, 4, 5, device=DEVICE)
    if layout == "channels_last":
        g = g.to(memory_format=torch.channels_last)
    elif layout == "expanded":
        g = torch.randn(2, 1, 1, 1, device=DEVICE).expand(2, 3, 4, 5)
    (gradient,) = torch.autograd.grad(y, x, g)
    m = torch.where(y == 0, 0.0, torch.tensor(rate(P)[1], dtype=torch.float32))
    assert torch.equal(gradient, g * m.to(DEVICE))


# Torch's semantics


@on_each
@dtypes
def test_trivial_cases_are_torchs(backend, dtype):
    x = torch.randn(3, 4, device=DEVICE).to(dtype)
    assert F.dropout(x, 0.0, backend=backend) is x
    assert F.dropout(x, 0.5, training=False, backend=backend) is x
    assert F.dropout(x[:0], 0.5, backend=backend).shape == (0, 4)
    y = F.dropout(x, 1.0, backend=backend)
    assert torch.equal(y, TF.dropout(x, 1.0))
    assert y is not x


def test_states_need_not_be_contiguous():
    state = torch.stack([rng_state(), rng_state()], dim=1)[:, 0]
    expected = F.dropout(torch.ones(50), P, rng_state=rng_state())
    assert torch.equal(F.dropout(torch.ones(50), P, rng_state=state), expected)


def test_what_draws_nothing_takes_what_torch_takes():
    for x in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64)):
        for p in (0.0, 1.0):
            assert torch.equal(F.dropout(x, p), TF.dropout(x, p))
        assert F.dropout(x, 0.5, training=False) is x
    with pytest.warns(UserWarning):
        assert F.dropout2d(torch.ones(3), 0.0).shape == (3,)


def test_fake_tensors_draw_nothing_real():
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_rng_state()
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            assert F.dropout(torch.empty(4, 5, device=device)).shape == (4, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_leaves_the_dtype_alone_as_torch_does():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(4, dtype=dtype)
            assert F.dropout(x).dtype == TF.dropout(x).dtype == dtype


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same_mask(use_reentrant):
    x = torch.ones(1000, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: F.dropout(x, P).exp(), x, use_reentrant=use_reentrant
    )
    y.sum().backward()
    m = y.detach().log()  # the multiplier, since x is 1
    torch.testing.assert_close(x.grad, m * y.detach())


def test_fx_proxies_pass():
    graph = torch.fx.symbolic_trace(lambda x: F.dropout(x, 0.25))
    assert any(node.target is F.dropout for node in graph.graph.nodes)
    assert graph(torch.ones(10)).shape == (10,)


@pytest.mark.parametrize(
    ("ours", "theirs", "shapes"),
    [
        (F.dropout1d, TF.dropout1d, [(3, 4), (2, 3, 4)]),
        (F.dropout2d, TF.dropout2d, [(2, 3, 4, 5)]),
        (F.dropout3d, TF.dropout3d, [(2, 3, 4, 5), (2, 3, 2, 4, 5)]),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_channel_dropout_takes_what_torch_takes(ours, theirs, shapes, inplace):
    for shape in shapes:
        x = torch.ones(shape)
        assert ours(x, 0.5, training=False, inplace=inplace) is x
        y = ours(x, 0.5, inplace=inplace)
        assert y.shape == theirs(torch.ones(shape), 0.5, inplace=inplace).shape == shape
        assert (y is x) == inplace
        channels = 2 if len(shape) == len(shapes[-1]) else 1
        flat = y.flatten(channels) if y.dim() > channels else y.unsqueeze(-1)
        assert (flat == flat[..., :1]).all()


# Bad input


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("function", [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d])
@pytest.mark.parametrize("training", [True, False])
def test_p_outside_of_0_and_1(function, p, training):
    x = torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match=rf"{function.__name__}: p must be in \[0, 1\], got"):
        function(torch.ones(2, 3, 4, 5)[0] if function is F.dropout1d else x, p, training)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_dtype(dtype):
    with pytest.raises(RuntimeError, match="dropout: input must be one of float64"):
        F.dropout(torch.ones(3).to(dtype))
    with pytest.raises(RuntimeError):
        TF.dropout(torch.ones(3, dtype=torch.int64))


def test_a_sparse_input():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="dropout: input must be a dense tensor, got sparse_coo"):
        F.dropout(torch.ones(3).to_sparse())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (torch.tensor([1]), RuntimeError),
        (torch.tensor([1.0, 2.0]), RuntimeError),
        (torch.empty(2, dtype=torch.int64, device="meta"), RuntimeError),
        ([1, 2], TypeError),
    ],
)
def test_bad_rng_state(state, error):
    with pytest.raises(error, match="dropout: rng_state must be"):
        F.dropout(torch.ones(3), rng_state=state)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="dropout: input must be a Tensor, got list"):
        F.dropout([1.0])


def test_bad_offset_and_backend():
    with pytest.raises(ValueError, match=r"element_offset must be in \[0, 2\^62\), got -1"):
        F.dropout(torch.ones(3), element_offset=-1)
    with pytest.raises(ValueError, match="backend must be one of native, triton, reference"):
        F.dropout(torch.ones(3), backend="cuda")


@pytest.mark.parametrize(
    ("function", "shape"), [(F.dropout1d, (3,)), (F.dropout1d, (1, 2, 3, 4)), (F.dropout2d, (3,))]
)
def test_channel_dropout_of_wrong_rank(function, shape):
    warning = pytest.warns(UserWarning) if function is F.dropout2d else nullcontext()
    with warning, pytest.raises(RuntimeError, match=f"{function.__name__}: input must"):
        function(torch.ones(shape))


# Registration and compilation


@pytest.mark.parametrize("name", ["dropout", "feature_dropout", "dropout_", "feature_dropout_"])
def test_opcheck_of_a_traced_p(name):
    overload = getattr(torch.ops.reg_kernels, name).default
    traced = torch.tensor(P, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=layout)
        x.requires_grad_(not name.endswith("_"))
        opcheck(overload, (x, 0.0, rng_state(), 3, traced))


@pytest.fixture
def counted():
    """torch.compile(fullgraph=True) by inductor, and how many programs that made."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def test_compile_recompiles_at_most_once_as_p_changes(counted):
    compiled, counter = counted
    function = compiled(lambda x, p: F.dropout(x, p))
    x = torch.ones(20_000, requires_grad=True)
    for p in (0.1, 0.2, 0.35, 0.5):
        y = function(x, p)
        kept = y != 0
        assert abs(float(kept.float().mean()) - (1 - p)) < 0.02
        assert torch.equal(y[kept], torch.full_like(y[kept], rate(p)[1]))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y.detach())
    assert counter.frame_count <= 2


def test_compile_recompiles_at_most_once_as_the_batch_changes(counted):
    compiled, counter = counted
    function = compiled(lambda x: F.dropout2d(F.dropout(x, 0.2), 0.3))
    for n in (8, 9, 10, 16):
        assert function(torch.ones(n, 4, 5, 5)).shape == (n, 4, 5, 5)
    assert counter.frame_count <= 2


def test_compiled_draws_are_fresh_and_seeded(counted):
    compiled, _ = counted
    function = compiled(lambda x: F.dropout(x, 0.5))
    x = torch.ones(1000)
    torch.manual_seed(1)
    a, b = function(x), function(x)
    torch.manual_seed(1)
    assert torch.equal(function(x), a)
    assert not torch.equal(a, b)


def test_compiled_choice_follows_the_forced_backend(counted):
    compiled, counter = counted
    function = compiled(lambda x: F.dropout(x, 0.5))
    function(torch.ones(5))
    with backends.backend("reference"):
        function(torch.ones(5))
    targets = {str(n.target) for g in counter.graphs for n in g.graph.nodes}
    assert "reg_kernels.dropout.default" in targets or not isas()
    assert "reg_kernels.dropout.reference" in targets


# torch.func and forward-mode differentiation


def test_vmap_takes_torchs_randomness():
    x = torch.ones(50, 40)

    def mapped(randomness):
        return torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness=randomness)(x)

    same, different = mapped("same"), mapped("different")
    assert torch.equal(same, same[:1].expand(50, 40))
    assert len({tuple(row) for row in different.tolist()}) == 50
    with pytest.raises(RuntimeError, match="randomness error mode"):
        mapped("error")


@dtypes
def test_transformed_values_round_as_the_others(dtype):
    x = torch.randn(500).to(dtype)
    output, _ = torch.func.jvp(
        lambda x: F.dropout(x, P, rng_state=rng_state()), (x,), (torch.ones_like(x),)
    )
    assert torch.equal(output, F.dropout(x, P, rng_state=rng_state()))
