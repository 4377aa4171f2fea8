"""BatchNorm's Triton kernels: values and gradients in every tiling."""

import itertools
import math

import pytest
import torch

from support import DEVICE, DTYPE_IDS, DTYPES, rng_state

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from reg_kernels.reference import batch_norm as reference  # noqa: E402
from reg_kernels.triton import batch_norm as kernels  # noqa: E402
from reg_kernels.triton._channels import Sizes, Tiles, position_offsets  # noqa: E402
from reg_kernels.triton._plan import PARTIALS, plan_for  # noqa: E402

NONE, RELU, LEAKY_RELU, SILU, GELU = range(5)
EPS, SLOPE, P = 1e-5, 0.2, 0.3
OFFSET = 12  # of the mask, which begins within one of its groups

# The interpreter's numpy speaks up where a kernel meets Inf - Inf.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]
FLOAT = torch.float32

SHAPES = [
    (4, 3, 5, 5),
    (6, 3),
    (2, 3, 7),
    (2, 2, 3, 3, 3),
    (1, 5, 129),
    (130, 2),
    (3, 70, 2),
    (37, 1),
    (2, 1, 45),
    (2, 16, 4, 6),
    (3, 8, 5),
]
SMALL = (3, 2, 3, 5)  # three parts of 16 positions, the last not full
INTERPRETED = DEVICE == "cpu"
# Of one value, in units of its own size. The interpreter truncates to bfloat16: one ulp.
RELATIVE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
}


@pytest.fixture(params=["kept", "looped", "split"])
def tiling(request, monkeypatch):
    """Makes tiles small: a channel in one tile, in one program's loop, or in several programs'."""

    def tiled(itemsize, elements=None):
        elements = elements or (32 if request.param == "looped" else 16)
        if request.param != "kept":
            for name in ("FORWARD_TILE", "BACKWARD_TILE", "MAP_TILE"):
                monkeypatch.setattr(kernels, name, elements * itemsize)
        size = 4 if request.param == "split" else 1
        monkeypatch.setattr(kernels, "processors", lambda x: size)

    return tiled


def like(x):
    return torch.empty_like(x).copy_(torch.randn(x.shape))


class Case:
    """An input and what goes with it; `forward` and `backward` run one implementation on copies."""

    def __init__(
        self,
        shape,
        activation=NONE,
        residual=False,
        p=0.0,
        dtype=FLOAT,
        channel_dtype=None,
        channels_last=False,
        affine=True,
        momentum=0.1,
    ):
        channels = shape[1]
        x = (2 * torch.randn(shape) + 3).to(DEVICE, dtype)
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        self.x, self.g = x, like(x)
        self.residual = like(x) if residual else None
        values = [torch.rand(channels) + 0.5 for _ in range(4)]
        values = [v.to(DEVICE, channel_dtype or dtype) for v in values]
        self.weight, self.bias = values[:2] if affine else (None, None)
        self.running = (*values[2:], torch.tensor(3, device=DEVICE))
        self.activation, self.p, self.momentum = activation, p, momentum
        self.state = rng_state() if p > 0.0 else None

    def forward(self, implementation, keep_gate=True):
        """(output, mean, invstd, gate) and the running statistics after it."""
        running = [t.clone() for t in self.running]
        outputs = implementation.batch_norm(
            *(self.x, self.weight, self.bias, self.residual, running, self.momentum, EPS),
            *(self.activation, SLOPE, self.p, self.state, OFFSET, keep_gate, None, None),
        )
        return outputs, running

    def inference(self, implementation):
        return implementation.batch_norm_inference(
            *(self.x, self.weight, self.bias, self.residual, *self.running[:2], EPS),
            *(self.activation, SLOPE),
        )

    def backward(self, implementation, outputs=None, wants=(True, True, True)):
        """Through the training forward of these outputs, or the frozen one."""
        if outputs is None:
            mean, var = (t.double() for t in self.running[:2])
            mean, invstd, gate = mean, (var + EPS).rsqrt(), None
        else:
            _, mean, invstd, gate = outputs
        gate = None if gate is None or gate.numel() == 0 else gate
        return implementation.batch_norm_backward(
            *(self.g, self.x, self.weight, self.bias, self.residual, mean, invstd, gate),
            *(
                self.state,
                OFFSET,
                outputs is not None,
                self.activation,
                SLOPE,
                self.p,
                *wants,
                None,
            ),
        )


def assert_close(ours, theirs, dtype, size=1.0):
    """Within the rounding of values of `dtype` about as large as `size`."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.stride() == theirs.stride() or ours.numel() <= 1
    own = RELATIVE[ours.dtype]
    absolute = RELATIVE[torch.promote_types(dtype, FLOAT)] * size
    torch.testing.assert_close(ours, theirs, rtol=max(own, absolute / size), atol=absolute)


def check(case, keep_gate=True):
    """Forward, running statistics and gradients against the reference's."""
    dtype = case.x.dtype
    (ours, our_running), (theirs, their_running) = (
        case.forward(i, keep_gate) for i in (kernels, reference)
    )
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert_close(a, b, dtype)
    for a, b in zip(our_running[:2], their_running[:2], strict=True):
        assert_close(a, b, dtype)
    assert our_running[2] == their_running[2]
    assert ours[3].shape == theirs[3].shape
    # Other orders, the same bits; those behind the last are zero.
    count = [sum(v.bit_count() for v in gate.tolist()) for gate in (ours[3], theirs[3])]
    assert count[0] == count[1]
    if case.p > 0.0 and not keep_gate:
        return  # a backward needs it
    size = math.sqrt(case.x.numel() / case.x.shape[1])
    for a, b in zip(case.backward(kernels, ours), case.backward(reference, theirs), strict=True):
        assert_close(a, b, dtype, size)


VARIETY = list(itertools.product([SILU, RELU, LEAKY_RELU, GELU, NONE], [True, False], [P, 0.0]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, channels_last, tiling):
    # What has few positions lies in one tile in any case: then rather in few programs.
    tiling(4, elements=256 if math.prod(shape) <= 32 * shape[1] else None)
    activation, residual, p = VARIETY[SHAPES.index(shape) * 3 % len(VARIETY)]
    check(Case(shape, activation, residual, p, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("p", [0.0, P, 1.0])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", range(5))
def test_chains(activation, residual, p, channels_last):
    for keep_gate in (True, False) if p < 1.0 else (True,):
        check(Case(SMALL, activation, residual, p, channels_last=channels_last), keep_gate)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_dtypes(dtype, mixed, tiling):
    tiling(dtype.itemsize)
    channel_dtype = FLOAT if mixed and dtype.itemsize == 2 else dtype
    activation, p = (GELU, 0.0) if mixed else (RELU, P)
    check(Case(SMALL, activation, True, p, dtype, channel_dtype, channels_last=mixed))


@pytest.mark.parametrize("activation", [NONE, RELU, SILU])
def test_without_parameters(activation, tiling):
    tiling(4)
    check(Case(SMALL, activation, affine=False))


def test_momentum_none_averages_the_batches(tiling):
    tiling(4)
    case = Case(SMALL, momentum=None)
    check(case)
    _, running = case.forward(kernels)
    mean = case.x.double().mean((0, 2, 3))
    expected = case.running[0] * 0.75 + mean.to(FLOAT) * 0.25
    torch.testing.assert_close(running[0], expected)


def test_untracked():
    case = Case(SMALL)
    case.forward = lambda i: i.batch_norm(
        *(
            case.x,
            case.weight,
            case.bias,
            None,
            [],
            0.1,
            EPS,
            NONE,
            SLOPE,
            0.0,
            None,
            0,
            True,
            None,
            None,
        ),
    )
    for a, b in zip(case.forward(kernels)[:3], case.forward(reference)[:3], strict=True):
        assert_close(a, b, FLOAT)


# Frozen statistics


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [SMALL, (6, 3), (1, 5), (2, 3, 33)], ids=str)
def test_frozen(shape, channels_last, tiling):
    tiling(4)
    for activation, residual in [(RELU, False), (GELU, True), (LEAKY_RELU, True)]:
        case = Case(shape, activation, residual, channels_last=channels_last)
        assert_close(case.inference(kernels), case.inference(reference), FLOAT)
        size = math.sqrt(case.x.numel() / case.x.shape[1])
        for a, b in zip(case.backward(kernels), case.backward(reference), strict=True):
            assert_close(a, b, FLOAT, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_frozen_dtypes(dtype):
    case = Case(SMALL, SILU, True, dtype=dtype)
    assert_close(case.inference(kernels), case.inference(reference), dtype)
    for a, b in zip(case.backward(kernels), case.backward(reference), strict=True):
        assert_close(a, b, dtype, 10.0)


def test_a_frozen_gradient_does_not_look_at_the_input(tiling):
    tiling(4)
    case = Case(SMALL)
    case.x[0, 0, 0, 0] = math.inf
    grad_input = case.backward(kernels)[0]
    assert grad_input.isfinite().all()


@pytest.mark.parametrize("activation", range(5))
def test_at_zero_the_gradient_is_that_from_below(activation):
    case = Case(SMALL, activation, affine=False)
    case.x = torch.randint(-1, 2, SMALL).to(DEVICE, FLOAT)
    case.running[0].zero_()
    for a, b in zip(case.backward(kernels), case.backward(reference), strict=True):
        assert_close(a, b, FLOAT, 10.0)


# What is wanted


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_that_are_wanted(wants, training, tiling):
    tiling(4)
    case = Case(SMALL, LEAKY_RELU, True, P if training else 0.0)
    outputs = [case.forward(i)[0] if training else None for i in (kernels, reference)]
    ours = case.backward(kernels, outputs[0], wants)
    theirs = case.backward(reference, outputs[1], wants)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, FLOAT, 10.0)


# Dropout


# By the length of what lies together, draws are taken 8, 4, 2 or 1 elements at a time.
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 2, 8, 3),
        (3, 8, 3),
        (3, 4, 12),
        (2, 12, 2, 3),
        (3, 6, 6),
        (3, 3, 7),
        (1, 9, 9),
        (2, 1, 9),
    ],
    ids=str,
)
def test_drops_what_the_reference_drops(shape, channels_last, tiling):
    tiling(4)
    case = Case(shape, p=P, channels_last=channels_last)
    (ours, *_), (theirs, *_) = (case.forward(i)[0] for i in (kernels, reference))
    assert torch.equal(ours == 0, theirs == 0)
    assert 0 < int((ours == 0).sum()) < ours.numel()


def test_a_dropped_nan_stays():
    case = Case(SMALL, p=P)
    case.x[:, 1] = math.nan
    output = case.forward(kernels)[0][0]
    assert output[:, 1].isnan().all()
    assert output[:, 0].isfinite().all()


# Numerics


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["far", "outlier", "steps", "constant"])
def test_statistics_are_as_good_as_torchs(kind, channels_last, tiling):
    tiling(4, elements=256)
    x = torch.randn(4, 2, 16, 16)
    if kind == "far":
        x = 1e4 + 1e-2 * x
    elif kind == "outlier":
        x[0, :, 0, 0] = 1e6
    elif kind == "steps":  # the first values say nothing of the others
        x = 1e-2 * x
        x[1:] += 1e4
    else:
        x = torch.full_like(x, 0.1)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    case = Case(x.shape)
    case.x = x.to(DEVICE)
    ours, truth = (case.forward(i)[0] for i in (kernels, reference))
    torchs = torch.native_batch_norm(case.x, case.weight, case.bias, None, None, True, 0.1, EPS)

    def errors(outputs):
        """Of the output, the mean in deviations, and the deviation, relative."""
        output, mean, invstd = (t.double() for t in outputs[:3])
        exact = truth[0].double()
        return (
            float(((output - exact) / (1 + exact.abs())).abs().max()),
            float(((mean - truth[1]) * truth[2]).abs().max()),
            float((invstd / truth[2] - 1).abs().max()),
        )

    # The interpreter sums along a first axis one by one, a thousand values; a GPU as a tree.
    slack = 3e-5 if INTERPRETED and channels_last else 1e-6
    for own, allowed in zip(errors(ours), errors(torchs), strict=True):
        assert own <= 2 * allowed + slack


@pytest.mark.parametrize(
    ("value", "channels_last"), [(math.inf, False), (-math.inf, True), (math.nan, False)]
)
def test_inf_and_nan_stay_in_their_channel(value, channels_last, tiling):
    tiling(4)
    case = Case(SMALL, RELU, True, channels_last=channels_last)
    others, place = [0], 0 if channels_last else -1
    clean, clean_running = case.forward(kernels)
    clean_gradients = case.backward(kernels, clean)
    case.x[place, 1, place, place] = value
    outputs, running = case.forward(kernels)
    expected, expected_running = case.forward(reference)
    assert torch.equal(outputs[0][:, others], clean[0][:, others])
    assert outputs[0][:, 1].isnan().all()
    statistics = [*outputs[1:3], *running[:2]]
    for a, b, c in zip(
        statistics,
        [*expected[1:3], *expected_running[:2]],
        [*clean[1:3], *clean_running[:2]],
        strict=True,
    ):
        assert torch.equal(a[others], c[others])
        torch.testing.assert_close(a[1], b[1], equal_nan=True)  # the mean is infinite
    gradients = case.backward(kernels, outputs)
    assert torch.equal(gradients[0][:, others], clean_gradients[0][:, others])
    assert gradients[0][:, 1].isnan().all()
    for a, c in zip(gradients[1:3], clean_gradients[1:3], strict=True):
        assert torch.equal(a[others], c[others])


def test_two_runs_give_the_same_bits(tiling):
    tiling(4)
    case = Case(SMALL, LEAKY_RELU, True, P)
    first, second = (case.forward(kernels) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)
    gradients = [case.backward(kernels, outputs) for outputs, _ in (first, second)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# Tiles


@triton.jit
def offsets_kernel(
    out_ptr,
    m0_ptr,
    C,
    L,
    TILES: tl.constexpr,
):
    """out int64 [BLOCK_M]: offsets of the positions from *m0_ptr on."""
    m0 = tl.load(m0_ptr)
    if not TILES.WIDE:
        m0 = m0.to(tl.int32)
    at = position_offsets(m0, Sizes(C, L, L), 1, TILES.BLOCK_M, TILES)
    tl.store(out_ptr + tl.arange(0, TILES.BLOCK_M), at)


@pytest.mark.parametrize(
    ("m0", "C", "L"),
    [
        (0, 3, 2),
        (96, 5, 7),
        (64 * 31, 2048, 49),
        (64 * 1000, 3, 63),
        (64 * 1000, 3, 64),
        (64 * 1000, 3, 100),
        (2**31 - 2**16, 7, 49),
        (2**31 - 64, 7, 49),
        (2**33 + 64, 7, 50176),
        (2**33 + 64, 1, 2**33 + 1000),
        (2**31 - 2**17, 70_000, 31),
    ],
)
def test_positions_past_two_to_the_31(m0, C, L):
    count = 64
    out = torch.empty(count, dtype=torch.int64, device=DEVICE)
    start = torch.tensor([m0], device=DEVICE)
    wide = m0 > 2**31 - 2**16
    offsets_kernel[(1,)](out, start, C, L, Tiles(1, count, 1, count > L, 1, wide))
    assert out.tolist() == [m // L * C * L + m % L for m in range(m0, m0 + count)]
    offsets_kernel[(1,)](out, start, C, L, Tiles(1, count, 0, False, 1, wide))
    assert out.tolist() == [m * C for m in range(m0, m0 + count)]


GPU = 132  # multiprocessors


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("samples", "channels", "length"),
    [
        (32, 64, 56 * 56),
        (32, 64, 112 * 112),
        (32, 2048, 49),
        (128, 512, 196),
        (8, 3, 512 * 512),
        (1, 1, 2**33),
        (512, 1024, 1),
        (2, 1, 1),
        (2, 100_000, 1),
        (4096, 17, 5),
        (64, 24, 33),
    ],
)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("merges", [False, True])
def test_plans_cover_the_input_and_fill_the_device(
    samples, channels, length, channels_last, itemsize, merges
):
    for tile in (kernels.FORWARD_TILE, kernels.BACKWARD_TILE):
        plan = plan_for(samples, channels, length, channels_last, itemsize, tile, GPU, merges)
        width, height = plan.blocks.BLOCK_C, plan.blocks.BLOCK_M
        blocks, count = -(-channels // width), samples * length
        assert plan.programs == blocks * plan.splits
        assert plan.splits * plan.tiles * height >= count  # all positions
        assert (plan.splits - 1) * plan.tiles * height < count  # and no range without any
        assert height % 16 == 0  # halves hold whole bytes of the gate
        assert (plan.gate_axis == 1 and width % 8 == 0) or channels % 8 or not channels_last
        assert not plan.single or plan.splits == plan.tiles == 1
        assert width * height <= max(tile // itemsize, 16)
        if merges:
            assert plan.splits == 1 or width * plan.splits <= PARTIALS
            enough = count * channels * itemsize > 64 * tile
            assert plan.programs >= 60 or not enough


def test_launches():
    def splits(*arguments):
        return plan_for(*arguments, kernels.FORWARD_TILE, GPU, True).splits

    for channels_last in (False, True):
        assert splits(32, 64, 56 * 56, channels_last, 2) > 1  # few channels, many pixels
        assert splits(256, 4096, 1, channels_last, 2) == 1  # many channels, few pixels
    assert splits(32, 2048, 49, False, 2) == 1
