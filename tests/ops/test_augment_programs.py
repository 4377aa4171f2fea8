"""Programs that are drawn at random: the native interpreter writes the reference's bits, by every
instruction set, whatever follows what."""

import itertools
import math
import random

import pytest
import torch

from reg_kernels import _C
from reg_kernels._augment_program import CHANNELS, WIDTH, Axes, Op, Pad, instruction, key_arguments
from reg_kernels.ops.augment import run

from support import isas

pytestmark = pytest.mark.skipif(not isas(), reason="the native library was not built")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FILTERS = {Op.BOX: (0, 1, 2, 3, 6, 7), Op.WARP: (0, 1, 2, 3)}


class Programs:
    """Draws instructions for an image, and follows its size."""

    def __init__(self, drawn, channels, bound, exact):
        self.drawn, self.channels, self.bound, self.exact = drawn, channels, bound, exact
        self.saved = False
        self.size = (0, 0)

    def values(self, count):
        return [self.drawn.uniform(0.0, self.bound) for _ in range(count)]

    def whole(self, *ends):
        return float(self.drawn.randint(*ends))

    def key(self):
        return key_arguments(self.drawn.getrandbits(64))

    def resized(self):
        if not self.saved:
            self.size = (self.drawn.randint(1, 30), self.drawn.randint(1, 50))
        return self.size

    def region(self, inside=True):
        """top, left, height, width"""
        if not inside:
            sides = [self.whole(1, side + 8) for side in self.size]
            return [self.whole(-5, 5), self.whole(-5, 5), *sides]
        sides = [self.whole(1, side) for side in self.size]
        corner = [self.whole(0, int(a - b)) for a, b in zip(self.size, sides, strict=True)]
        return [*corner, *sides]

    def box(self):
        pad = self.drawn.choice(list(Pad))
        region = self.region(inside=pad == Pad.NONE)
        out = self.resized()
        if not self.saved and self.drawn.random() < 0.2:
            out = self.size = (int(region[2]), int(region[3]))
        kind = self.drawn.choice(FILTERS[Op.BOX])
        return [*region, *out, self.whole(0, 3), kind, pad, *self.values(4)]

    def warp(self):
        height, width = self.size
        out = self.resized()
        scale = (2.0 / width, 2.0 / height) if self.exact else (1.0, 1.0)  # torchvision's grid
        matrix = [
            self.drawn.uniform(-1.3, 1.3) * s
            for s, side in zip(scale, self.size[::-1], strict=True)
            for _ in range(3)
        ]
        for place, side in ((2, width), (5, height)):
            matrix[place] *= side
        last = [self.drawn.uniform(-0.02, 0.02) for _ in range(2)]
        last = self.drawn.choice(([0.0, 0.0], last))
        matrix[0] = 1e20 if self.drawn.random() < 0.05 else matrix[0]
        return [*matrix, *last, 1.0, *out, self.drawn.choice(FILTERS[Op.WARP]), *self.values(3)]

    def blur(self):
        axes = self.drawn.choice(list(Axes))
        sides = [
            side
            for side, other in zip(self.size, (Axes.HORIZONTAL, Axes.VERTICAL), strict=True)
            if axes != other
        ]
        radius = self.drawn.randint(0, min(12, *(side - 1 for side in sides), 12))
        weights = [math.exp(-k * k / 8.0) for k in range(radius + 1)]
        total = 2.0 * sum(weights) - 1.0
        return [axes, radius, *(w / total for w in weights)]

    def arguments(self, op):
        factor = self.drawn.uniform(0.0, 2.0)
        makers = {
            Op.BOX: self.box,
            Op.WARP: self.warp,
            Op.BRIGHTNESS: lambda: [factor],
            Op.CONTRAST: lambda: [factor, 1.0 - factor],
            Op.SATURATION: lambda: [factor, 1.0 - factor],
            Op.SHARPNESS: lambda: [factor, 1.0 - factor],
            Op.HUE: lambda: [self.drawn.uniform(-0.5, 0.5)],
            Op.SOLARIZE: lambda: self.values(1),
            Op.SOLARIZE_ADD: lambda: self.values(2),
            Op.POSTERIZE: lambda: [self.whole(0, 8)],
            Op.BLUR: self.blur,
            Op.NOISE: lambda: [*(0.2 * x for x in self.values(2)), 1, *self.key()],
            Op.PERMUTE: lambda: [self.whole(0, 2) for _ in range(3)],
            Op.ERASE: lambda: [*self.region(), 0, *self.values(4), *self.key()],
            Op.SALT_AND_PEPPER: lambda: [0.2, self.drawn.random(), *self.key()],
            Op.SAVE: lambda: [0.25],
            Op.JOIN: lambda: [0.5],
        }
        return makers[op]() if op in makers else []

    def of(self, size, steps, final):
        self.size, self.saved = size, False
        rows = []
        for _ in range(steps):
            ops = [
                op
                for op in Op
                if self.channels in CHANNELS.get(op, (self.channels,))
                and op != Op.NORMALIZE
                and (self.saved or op not in (Op.JOIN, Op.MIX))
            ]
            op = self.drawn.choice(ops)
            rows.append(instruction(op, *self.arguments(op)))
            self.saved = op == Op.SAVE or (self.saved and op != Op.MIX)
        if self.saved:
            rows.append(instruction(Op.MIX))
        rows.append(instruction(Op.BOX, 0, 0, *self.size, *final, self.whole(0, 3), 6, 0))
        erased = [0, 0, *(side // 2 for side in final), 1, 0, 0, 0, 0, *self.key()]
        rows.append(instruction(Op.ERASE, *erased))
        scales = [1.5 / self.bound if c else 1.0 for c in range(4)]
        rows.append(instruction(Op.NORMALIZE, *scales, 0.5, -0.25, 0.125, 0.0))
        return rows


def call_of(seed):
    """The arguments of a call."""
    drawn = random.Random(seed)
    dtype = drawn.choice((torch.uint8, torch.uint8, *FLOATS))
    is_bytes = dtype == torch.uint8
    exact = is_bytes and drawn.random() < 0.5
    channels = drawn.choice((1, 2, 3, 3, 3, 4))
    programs = Programs(drawn, channels, 255.0 if is_bytes else 1.0, exact)
    final = (drawn.randint(1, 20), drawn.randint(1, 40))
    sizes = [
        drawn.choice(((1, 1), (2, 150), (drawn.randint(1, 40), drawn.randint(1, 60))))
        for _ in "123"
    ]
    rows = [programs.of(size, drawn.randint(0, 5), final) for size in sizes]
    steps = max(map(len, rows))
    padded = [row + [[0.0] * WIDTH] * (steps - len(row)) for row in rows]
    lead = drawn.randint(0, 3)
    ends = [lead, *(channels * h * w for h, w in sizes)]
    offsets = itertools.accumulate(ends)
    x = torch.rand(sum(ends), generator=torch.Generator().manual_seed(seed))
    pixels = (x * 256).to(torch.uint8) if is_bytes else x.to(dtype)
    if not is_bytes and drawn.random() < 0.3:
        pixels[drawn.randrange(len(pixels))] = math.nan
    images = torch.tensor([(o, *size) for o, size in zip(offsets, sizes, strict=False)])
    to = drawn.choice((torch.uint8, *FLOATS))
    layouts = [drawn.random() < 0.5 for _ in "12"]
    return (
        pixels,
        images,
        torch.tensor(padded),
        channels,
        layouts[0],
        *final,
        to,
        layouts[1],
        exact,
    )


@pytest.fixture
def by_each():
    best = isas()[-1]
    yield lambda call: {isa: (_C.set_isa(isa), run(*call, backend="native"))[1] for isa in isas()}
    _C.set_isa(best)


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_native_is_the_reference(by_each, first):
    for seed in range(first, first + 10):
        call = call_of(seed)
        expected = run(*call, backend="reference")
        for isa, actual in by_each(call).items():
            same = torch.equal(actual.nan_to_num(7e4), expected.nan_to_num(7e4))
            assert same and actual.stride() == expected.stride(), f"seed {seed} by {isa}"
