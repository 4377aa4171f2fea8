"""BatchNorm on a GPU: streams, CUDA graphs, no waiting for the device, sizes past 2^31.

Skipped without a GPU; `make gpu-report` runs it. Tests with "short" in their name are those that it
runs under compute-sanitizer as well.
"""

import copy

import pytest
import torch
import torch.nn.functional as TF

from reg_kernels import backends, nn
from reg_kernels import functional as F
from reg_kernels.cases.dropout import P

from support import DTYPE_IDS, DTYPES, captured, implementations, no_waiting, rng_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

CUDA = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
kernels = pytest.mark.parametrize("backend", implementations("cuda")[:2])  # native and triton
layouts = pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])


def draw(shape, dtype=torch.float32, last=False, seed=0):
    """Values that are the same on every device, in either layout."""
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7).to(dtype)
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).to(CUDA)


def layer_of(channels, backend, dtype=torch.float32, **options):
    """A fused layer, or BatchNorm where there are no options for one, not in its initial state."""
    fused = {"activation", "drop"} & set(options)
    layer = (nn.BatchNormAct2d if fused else nn.BatchNorm2d)(channels, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in (*layer.parameters(), layer.running_mean, layer.running_var):
            values.uniform_(0.5, 2, generator=generator)
    return layer.to(CUDA, torch.promote_types(dtype, torch.float32))


def step(layer, *inputs, g=None):
    """Output and gradients of one call."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = layer(*leaves)
    if g is None:
        g = torch.empty_like(y).copy_(
            torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        )
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *layer.parameters()], g)]


def assert_close(ours, true):
    """Within some roundings of each result's dtype, of its largest value."""
    for i, (a, b) in enumerate(zip(ours, true, strict=True)):
        assert a.dtype == b.dtype
        a, b = a.double(), b.double()
        eps = max(torch.finfo(ours[i].dtype).eps, 1024 * 2.0**-52)
        compute = 64 * 2.0**-23 if ours[i].dtype != torch.float64 else 0
        assert float((a - b).abs().max()) <= (eps + compute) * max(1.0, float(b.abs().max())), i


def assert_same_bits(a, b):
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


# Values


# Few channels with many pixels, many with few; odd ones; what is cut into several splits or strips.
SHAPES = [
    (2, 1, 1, 1),
    (3, 5, 7, 3),
    (2, 3, 129, 65),
    (8, 2, 256, 256),
    (64, 4, 33, 31),
    (33, 130, 7, 7),
    (7, 255, 3, 2),
    (256, 2050, 1, 1),
    (16, 1024, 7, 7),
    (2, 64, 112, 112),
]


@kernels
@layouts
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "relu"}, {"activation": "silu"}, {"activation": "leaky_relu"}],
    ids=str,
)
def test_values_are_the_references(backend, shape, last, dtype, options):
    x, r = draw(shape, dtype, last), draw(shape, dtype, last, seed=1)
    inputs = (x, r) if options else (x,)
    found = []
    for name in (backend, "reference"):
        layer = layer_of(shape[1], name, dtype, **options)
        results = step(layer, *inputs)
        assert results[0].stride() == x.stride()
        layer.eval()
        found.append([*results, layer.running_mean, layer.running_var, *step(layer, *inputs)])
    assert_close(*found)


@kernels
@dtypes
def test_short_edges(backend, dtype):
    # Every path once: both layouts, odd sizes, misaligned data, a residual, a gate, no input grad.
    for shape in ((3, 5, 7, 3), (2, 3, 40, 41), (70, 40, 1, 1), (4, 64, 8, 8), (2, 520, 2, 3)):
        for last in (False, True):
            x, r, g = (draw(shape, dtype, last, seed) for seed in range(3))
            if not last:
                x, r, g = (
                    torch.cat((t[0, 0, 0, :1], t.flatten()))[1:].view(shape) for t in (x, r, g)
                )
            found = []
            for name in (backend, "reference"):
                layer = layer_of(shape[1], name, dtype, activation="gelu", drop=P)
                torch.manual_seed(1)
                found.append(step(layer, x, r, g=g))
                layer.eval()
                found[-1] += step(layer, x, r, g=g)
            assert_close(*found)


@kernels
@layouts
@dtypes
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", None])
def test_what_is_dropped_is_what_dropout_drops(backend, last, dtype, activation):
    for shape in ((3, 5, 7, 3), (2, 3, 129, 65), (7, 255, 3, 2), (33, 130, 7, 7), (90, 129, 1, 1)):
        x, r = draw(shape, dtype, last), draw(shape, dtype, last, seed=1)
        bias = torch.full(
            (shape[1],), 50.0, device=CUDA, dtype=torch.promote_types(dtype, torch.float32)
        )
        leaves = [t.requires_grad_() for t in (x, r)]
        y = F.batch_norm_act(
            *(leaves[0], None, None, None, bias, leaves[1], True),
            activation=activation,
            drop=P,
            rng_state=rng_state(),
            backend=backend,
        )
        d = torch.autograd.grad(y, leaves[1], torch.ones_like(y))[0]
        kept = F.dropout(torch.ones_like(x), P, rng_state=rng_state()) != 0
        assert torch.equal(y != 0, kept)
        assert torch.equal(d != 0, kept)


@kernels
@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_small_deviation_beside_a_large_mean(backend, last, dtype):
    x = (1e4 + 1e-2 * draw((16, 8, 56, 56), torch.float64, last)).to(dtype)
    y = F.batch_norm(x, None, None, training=True, backend=backend)
    wide = x.double()
    mean = wide.mean((0, 2, 3), keepdim=True)
    var = (wide - mean).square().mean((0, 2, 3), keepdim=True)
    true = (wide - mean) * (var + 1e-5).rsqrt()
    # A float64 mean of 1e4 has a rounding of 1e-12: 1e-10 of the deviation.
    assert float((y - true).abs().max()) <= (2e-9 if dtype == torch.float64 else 1e-5)


@kernels
@layouts
@dtypes
def test_nan_and_inf_stay_in_their_channel(backend, last, dtype):
    x = draw((8, 6, 33, 31), dtype, last)
    clean = x.clone()
    x[3, 1, 7, 5], x[7, 2, 32, 30], x[0, 4, 0, 0] = float("nan"), float("inf"), -float("inf")
    found = []
    for values in (x, clean):
        layer = layer_of(6, backend, dtype)
        results = step(layer, values)
        found.append([*(t.transpose(0, 1) if t.dim() > 1 else t for t in results)])
        found[-1] += [layer.running_mean, layer.running_var]
    for spoilt, without in zip(*found, strict=True):
        assert torch.equal(spoilt[[0, 3, 5]], without[[0, 3, 5]])
    assert found[0][0][[1, 2, 4]].isnan().all()
    assert found[0][-2][[1, 2, 4]].nan_to_num(7, float("inf"), -float("inf")).tolist() == [
        7,
        float("inf"),
        -float("inf"),
    ]
    assert found[0][-1][[1, 2, 4]].isnan().all()


@kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_as_torch(backend, memory_format):
    torch.manual_seed(1)
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16)).to(CUDA)
    theirs = theirs.to(memory_format=memory_format)
    ours = copy.deepcopy(theirs)
    ours[1] = nn.BatchNorm2d(16, backend=backend).to(CUDA)
    x = draw((8, 3, 32, 32)).to(memory_format=memory_format)
    for model in (ours, theirs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=memory_format)
        y.float().square().sum().backward()
    assert_close(
        [ours[1].running_mean, ours[1].running_var], [theirs[1].running_mean, theirs[1].running_var]
    )
    for a, b in zip(ours[1].parameters(), theirs[1].parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=2**-6, atol=1e-2 * float(b.grad.abs().max())
        )


# Streams, graphs, waiting


@kernels
@layouts
def test_work_is_on_the_current_stream(backend, last):
    values, g = draw((16, 32, 28, 28), last=last), draw((16, 32, 28, 28), last=last, seed=1)
    expected = step(layer_of(32, backend, activation="relu", drop=P).eval(), values, g=g)
    expected += step(layer_of(32, backend), values, g=g)
    x = torch.zeros_like(values)
    layers = layer_of(32, backend, activation="relu", drop=P).eval(), layer_of(32, backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # what does not wait for this reads zeros
        x.copy_(values)
        found = [t for layer in layers for t in step(layer, x, g=g)]
    stream.synchronize()
    assert_same_bits(found, expected)


@kernels
@layouts
def test_streams_do_not_share_working_space(backend, last):
    shapes = [(64, 8, 56, 56), (32, 64, 28, 28), (8, 3, 129, 65)]
    inputs = [(draw(s, last=last), draw(s, last=last, seed=1)) for s in shapes]
    layers = [layer_of(s[1], backend, activation="relu", momentum=0.0) for s in shapes]
    expected = [step(layer, *pair) for layer, pair in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in shapes]
    torch.cuda.synchronize()
    found = [[] for _ in shapes]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(step(layers[i], *inputs[i]))
    torch.cuda.synchronize()
    for results, true in zip(found, expected, strict=True):
        for each in results:
            assert_same_bits(each, true)


@kernels
@layouts
@pytest.mark.parametrize("momentum", [0.1, None])
def test_graph_replays_move_the_statistics(backend, last, momentum):
    shape = (16, 32, 28, 28)
    x, g = draw(shape, last=last), draw(shape, last=last, seed=1)
    layer, eager = (layer_of(32, backend, momentum=momentum) for _ in range(2))
    replay, results = captured(lambda: step(layer, x, g=g))
    layer.load_state_dict(eager.state_dict())  # in place: the graph goes on from here
    for seed in range(2, 6):
        x.copy_(draw(shape, last=last, seed=seed))
        replay()
        assert_same_bits(results, step(eager, x, g=g))
        assert_same_bits(layer.state_dict().values(), eager.state_dict().values())
    assert layer.num_batches_tracked == 4


@kernels
@layouts
def test_graph_replays_draw_fresh_masks(backend, last):
    shape = (16, 32, 28, 28)
    x, r = draw(shape, last=last), draw(shape, last=last, seed=1)
    layer = layer_of(32, backend, activation=None, drop=0.5)
    with torch.no_grad():
        layer.bias.fill_(100.0)
    ones = torch.ones_like(x)
    replay, (y, _, d, *_) = captured(lambda: step(layer, x, r, g=ones))
    masks = []
    for _ in range(3):
        replay()
        masks.append(y != 0)
        assert torch.equal(d, masks[-1] * 2.0)  # forward and backward share the replay's mask
        assert abs(float(masks[-1].float().mean()) - 0.5) < 0.01
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@kernels
@layouts
@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_waits_for_the_device(backend, last, momentum):
    x, r = draw((8, 16, 14, 14), last=last), draw((8, 16, 14, 14), last=last, seed=1)
    layers = [
        layer_of(16, backend, momentum=momentum),
        layer_of(16, backend, momentum=momentum, activation="relu", drop=P),
        layer_of(16, backend, activation="silu").eval(),
    ]
    for rounds in range(2):  # the first one compiles and loads
        for i, layer in enumerate(layers):
            inputs = (x, r) if i else (x,)
            if rounds == 0:
                step(layer, *inputs, g=r)
            else:
                with no_waiting():
                    step(layer, *inputs, g=r)
                    with torch.no_grad():
                        layer(*inputs)
    with no_waiting(), pytest.raises(RuntimeError, match="synchron"):
        x.sum().item()  # the mode does see such things


# Compilation, memory


@kernels
def test_compiled_reduce_overhead_trains(backend):
    torch._dynamo.reset()
    ours, eager = (layer_of(16, backend, momentum=None, activation="relu") for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        x, r = draw((8, 16, 14, 14), seed=seed), draw((8, 16, 14, 14), seed=seed + 10)
        assert_same_bits(step(compiled, x, r), step(eager, x, r))
    assert_same_bits(ours.state_dict().values(), eager.state_dict().values())
    torch._dynamo.reset()


@kernels
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(backend, last, dtype):
    x, r = (draw((32, 64, 56, 56), dtype, last, seed).requires_grad_() for seed in range(2))
    layer = layer_of(64, backend, dtype, activation="relu", drop=P)
    step(layer, x, r)
    size, slack = x.numel() * x.element_size(), 2 << 20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(x, r)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= size + x.numel() // 8 + slack  # the output, and a bit an element
    assert torch.cuda.max_memory_allocated() - before <= kept + slack
    g = torch.ones_like(y)
    torch.autograd.grad(y, (x, r), g)
    # both gradients beside the output and its gradient
    assert torch.cuda.max_memory_allocated() - before <= kept + 3 * size + slack


# Past 2^31


def enough(size):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip("not enough free GPU memory")


@kernels
@pytest.mark.parametrize("last", [False, True], ids=["a plane", "a column"])
def test_a_channel_of_more_than_2_to_the_31_values(backend, last):
    tail, eps = 8, 1e-5
    m = 2**31 + tail
    enough(8 * m)
    x = torch.empty(m, dtype=torch.bfloat16, device=CUDA)
    x[: 2**30], x[2**30 : 2**31], x[2**31 :] = -1.0, 1.0, 2.0**20
    x = x.view(m, 1) if last else x.view(1, 1, m)
    mean = tail * 2.0**20 / m
    m2 = 2.0**31 + tail * 2.0**40 - m * mean**2
    invstd = (m2 / m + eps) ** -0.5
    tracked = torch.zeros(1, device=CUDA), torch.ones(1, device=CUDA)
    weight, bias = (torch.ones(1, device=CUDA, requires_grad=True) for _ in range(2))
    y = F.batch_norm(x, *tracked, weight, bias, True, 1.0, eps, backend=backend)
    # In float32, whose every sum of 2^31 values is a tree.
    assert tracked[0].item() == pytest.approx(mean, rel=1e-5)
    assert tracked[1].item() == pytest.approx(m2 / (m - 1), rel=1e-5)
    flat = y.detach().view(-1)
    for begin, end, value in ((0, 2**30, -1), (2**30, 2**31, 1), (2**31, m, 2**20)):
        expected = (value - mean) * invstd + 1
        for at in (begin, (begin + end) // 2, end - 1):
            assert flat[at].item() == pytest.approx(expected, rel=2**-7)
    gradients = torch.autograd.grad(y, (weight, bias), x)
    assert gradients[0].item() == pytest.approx(m2 * invstd, rel=1e-4)
    assert gradients[1].item() == pytest.approx(tail * 2.0**20, rel=1e-4)


@kernels
@layouts
def test_more_than_2_to_the_31_elements(backend, last):
    # Samples repeat, so that the statistics are those of the first ones.
    part, repeats = (4, 96, 128, 128), 350
    enough(9 * 2 * 4 * 96 * 128 * 128 * repeats)
    few = draw(part, torch.bfloat16, last)
    x = few.repeat(repeats, 1, 1, 1)
    x = x.to(memory_format=torch.channels_last) if last else x
    assert x.numel() > 2**31
    assert x.stride()[1:] == few.stride()[1:]
    x.requires_grad_()
    y = F.batch_norm_act(
        x,
        None,
        None,
        training=True,
        activation=None,
        drop=0.5,
        rng_state=rng_state(),
        backend=backend,
    )
    kept = F.dropout(torch.ones_like(x), 0.5, rng_state=rng_state())
    true = TF.batch_norm(few.float(), None, None, training=True)
    for at in (0, repeats // 2, repeats - 1):
        rows = slice(4 * at, 4 * at + 4)
        mask = kept[rows].float()
        torch.testing.assert_close(y.detach()[rows].float(), true * mask, rtol=2**-7, atol=2**-7)
    del kept
    gradient = torch.autograd.grad(y, x, y.detach())[0]
    # d = y m, m being 0 or 2; dx = invstd (d - mean(d) - xhat mean(d xhat)), of which the means go
    # by x alone where every mask is as likely: mean(d) = 0, mean(d xhat) = 2.
    deviation = few.float().var((0, 2, 3), unbiased=False, keepdim=True).sqrt()
    for at in (0, repeats // 2, repeats - 1):
        rows = slice(4 * at, 4 * at + 4)
        d = y.detach()[rows].float() * (y.detach()[rows] != 0) * 2
        expected = (d - 2 * true) / deviation
        torch.testing.assert_close(gradient[rows].float(), expected, rtol=2**-6, atol=2**-5)


def test_native_is_the_choice():
    assert backends.choose("batch_norm", "cuda", torch.float32) == "native"
