"""The optimizer step's op: lists of every dtype and size, native against the reference."""

import math
import os
from array import array

import pytest
import torch
from torch.library import opcheck

from reg_kernels._tensor_table import CHUNK, ROWS, TensorTable, work_units
from reg_kernels.ops.optimizer_step import (
    ALGORITHMS,
    DECAYS,
    OP,
    ROUNDINGS,
    Hyperparameters,
    PreparedStep,
    StepLists,
)
from reg_kernels.reference.optimizer_step import clip_factor, soft_threshold

from support import DEVICE, DTYPE_IDS, DTYPES, implementations, isas, rng_state

INTERPRETED = DEVICE == "cpu"
IMPLEMENTATIONS = implementations()
on_each = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
KERNELS = IMPLEMENTATIONS[:2]  # native and triton, held to the reference
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
native = pytest.mark.skipif(not isas(), reason="the native library was not built")

SIZES = (0, 1, 3, 63, 64, 65, 511, 512, 513, 8191, 8192, 8193)
SMALL = (0, 1, 5, 33)
PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
pairs = pytest.mark.parametrize(
    ("dtype", "moments"), PAIRS, ids=[f"{a}-{b}".replace("torch.", "") for a, b in PAIRS]
)


pytestmark = pytest.mark.usefixtures("one_thread")


def group(**changes):
    values = {
        "lr": 0.1,
        "decay_lr": 0.5,
        "weight_decay": 0.2,
        "l1": 0.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-3,
        "ema_decay": 0.75,
        "decay": "decoupled",
        "maximize": False,
        "nesterov": False,
    }
    return Hyperparameters(**(values | changes))


class Lists:
    """The op's arguments, of random values, with every kind of state that is asked for."""

    def __init__(
        self,
        sizes,
        dtype,
        moments=None,
        algorithm="adam",
        groups=None,
        rounding="nearest",
        amsgrad=False,
        momentum=True,
        ema=False,
        arrange=lambda x: x,
    ):
        moments = moments or dtype
        compute = torch.promote_types(dtype, torch.float32)
        self.algorithm, self.rounding = algorithm, rounding
        self.groups = groups or [group()]

        def values(kind, positive=False):
            tensors = []
            for n in sizes:
                x = torch.randn(n, dtype=torch.float64)
                x = x.square() if positive else x
                tensors.append(arrange(x.to(kind).to(DEVICE)))
            return tensors

        adam = algorithm == "adam"
        stateful = adam or (momentum and algorithm == "sgd")
        self.grads = [] if algorithm == "average" else values(dtype)
        self.lists = StepLists(
            values(dtype),
            self.grads,
            [torch.full((), float(i % 3), device=DEVICE) for i in range(len(sizes))]
            if stateful
            else [],
            values(moments) if stateful else [],
            values(moments, True) if adam else [],
            values(moments, True) if adam and amsgrad else [],
            values(compute) if ema else [],
            # As small as what rounding takes off.
            [x * torch.finfo(dtype).eps / 8 for x in values(dtype)]
            if rounding == "kahan" and dtype.itemsize == 2
            else [],
            [i % len(self.groups) for i in range(len(sizes))],
            offsets(sizes),
        )

    def state(self):
        lists = self.lists
        return {
            "params": lists.params,
            "steps": lists.steps,
            "first": lists.first_moments,
            "second": lists.second_moments,
            "max": lists.max_second_moments,
            "ema": lists.emas,
            "compensation": lists.compensations,
        }

    def copies(self):
        return {name: [x.clone() for x in of] for name, of in self.state().items()}

    def common(self, **changes):
        values = {
            "squares": None,
            "max_norm": 0.0,
            "grad_scale": None,
            "found_inf": None,
            "rng_state": rng_state() if self.rounding == "stochastic" else None,
            "rates": [],
        } | changes
        return (
            [x for g in self.groups for x in g.numbers()],
            [g.flags() for g in self.groups],
            values["rates"],
            ROUNDINGS.index(self.rounding),
            *(values[k] for k in ("squares", "max_norm", "grad_scale", "found_inf", "rng_state")),
        )

    def arguments(self, state=None, **changes):
        """The op's arguments, of these lists or of copies of them."""
        s = state or self.state()
        return (
            *(ALGORITHMS.index(self.algorithm), s["params"], self.grads, s["steps"], s["first"]),
            *(s["second"], s["max"], s["ema"], s["compensation"]),
            *(self.lists.groups, self.lists.element_offsets),
            *(self.lists.runs, self.lists.run_strides, *self.common(**changes)),
        )

    def run(self, backend, **changes):
        """All state after the op, on copies."""
        state = self.copies()
        OP.overloads[backend](*self.arguments(state, **changes))
        return state


def offsets(sizes):
    result, total = [], 0
    for n in sizes:
        result.append(total)
        total += -(-n // 8) * 8
    return result


def assert_close(a, b, dtype, moments):
    """Two implementations' state: apart by a rounding or two of where it is kept."""
    assert a.keys() == b.keys()
    compute = torch.promote_types(dtype, torch.float32)
    kept = {"params": dtype, "compensation": dtype, "ema": compute}
    for name in a:
        unit = torch.finfo(kept.get(name, moments)).eps
        unit = max(unit, torch.finfo(compute).eps * 8)
        for x, y in zip(a[name], b[name], strict=True):
            if name == "steps":
                assert torch.equal(x, y)
            elif name == "compensation":
                # Where the parameter went to its other neighbour so did what is left of it.
                assert x.isfinite().all()
            else:
                torch.testing.assert_close(x, y, rtol=2 * unit, atol=2 * unit)
    for x, y, c, d in zip(
        a["params"], b["params"], a["compensation"], b["compensation"], strict=False
    ):
        unit = 8 * torch.finfo(dtype).eps ** 2
        torch.testing.assert_close(
            x.double() + c.double(), y.double() + d.double(), rtol=unit, atol=unit
        )


VARIANTS = {
    "adam": {},
    "amsgrad": {"amsgrad": True, "ema": True},
    "adam l2 l1": {"groups": [group(decay="l2", l1=0.5, maximize=True)], "ema": True},
    "two groups": {"groups": [group(decay="decoupled_lr"), group(beta1=0.3, lr=0.01)]},
    "sgd": {"algorithm": "sgd", "momentum": False},
    "sgd momentum": {"algorithm": "sgd", "groups": [group(beta2=0.3)], "ema": True},
    "nesterov": {
        "algorithm": "sgd",
        "groups": [group(beta2=0.0, nesterov=True, decay="l2", l1=0.2)],
    },
    "kahan": {"rounding": "kahan", "ema": True},
    "average": {"algorithm": "average", "ema": True, "groups": [group(), group(ema_decay=0.25)]},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


# Values


@pairs
@variants
@pytest.mark.parametrize("backend", KERNELS)
def test_native_and_triton_are_the_reference(variant, dtype, moments, backend):
    sizes = SMALL if backend == "triton" and INTERPRETED else SIZES
    lists = Lists(sizes, dtype, moments, **VARIANTS[variant])
    before = lists.copies()
    own, truth = lists.run(backend), lists.run("reference")
    assert_close(own, truth, dtype, moments)
    # Everything was written, apart from what has no element.
    for name, tensors in own.items():
        for x, y in zip(tensors, before[name], strict=True):
            assert x.dtype == y.dtype
            if name == "params" and lists.algorithm == "average":
                assert torch.equal(x, y)
            elif x.numel() > 8 and name != "max":
                assert not torch.equal(x, y), name


@pairs
@pytest.mark.parametrize("backend", KERNELS)
def test_misaligned_views_and_what_lies_around_them(dtype, moments, backend):
    sizes = SMALL if backend == "triton" and INTERPRETED else SIZES
    wholes = []

    def misaligned(x):
        whole = torch.full((x.numel() + 2,), 7.0).to(x.dtype).to(DEVICE)
        whole[1:-1] = x
        wholes.append(whole)
        return whole[1:-1]

    lists = Lists(sizes, dtype, moments, amsgrad=True, ema=True, arrange=misaligned)
    truth = lists.run("reference")
    OP.overloads[backend](*lists.arguments())
    assert_close(lists.state(), truth, dtype, moments)
    for whole in wholes:
        assert whole[0] == whole[-1] == 7


@native
@pairs
@variants
def test_large_and_odd_with_several_threads(variant, dtype, moments):
    if DEVICE != "cpu":
        pytest.skip("of the CPU's threads")
    lists = Lists((100_003, 1, 8193, 70_001, 0, 31), dtype, moments, **VARIANTS[variant])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(lists.run("native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, tensors in results[0].items():
            for x, y in zip(tensors, other[name], strict=True):
                assert torch.equal(x, y), name
    assert_close(results[0], lists.run("reference"), dtype, moments)


@pytest.mark.parametrize("isa", isas())
@pairs
@variants
def test_each_instruction_set_gives_the_same_bits(isa, variant, dtype, moments):
    from reg_kernels import _C

    if DEVICE != "cpu":
        pytest.skip("of the CPU's instruction sets")
    lists = Lists(SIZES, dtype, moments, **VARIANTS[variant])
    best = _C.isa()
    expected = lists.run("native")
    try:
        _C.set_isa(isa)
        for name, tensors in lists.run("native").items():
            for x, y in zip(tensors, expected[name], strict=True):
                assert torch.equal(x, y), name
    finally:
        _C.set_isa(best)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_stochastic_rounding_draws_as_the_reference(backend, moments):
    sizes = SMALL if backend == "triton" and INTERPRETED else SIZES
    lists = Lists(sizes, torch.bfloat16, moments, rounding="stochastic")
    own, truth = lists.run(backend), lists.run("reference")
    for x, y in zip(own["params"], truth["params"], strict=True):
        # The same draws; where the sum ends within a rounding of float32 of a carry, another bit.
        different = x != y
        assert int(different.sum()) <= 1 + x.numel() // 500
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-30)
    other = lists.run(backend, rng_state=rng_state() + 1)
    assert any(not torch.equal(x, y) for x, y in zip(own["params"], other["params"], strict=True))
    if backend == "triton" and INTERPRETED:
        return  # it truncates where it should round to the nearest
    nearest = Lists(sizes, torch.bfloat16, moments)
    nearest.lists, nearest.grads = lists.lists, lists.grads
    changed = [
        (x != y).float().mean()
        for x, y in zip(own["params"], nearest.run(backend)["params"], strict=True)
        if x.numel() > 30
    ]
    assert all(0.05 < c < 0.5 for c in changed)


@on_each
@pytest.mark.parametrize("cut", [64, 61])
def test_an_element_keeps_its_draw_wherever_its_tensor_is_cut(backend, cut):
    n = 264
    lists = Lists((n,), torch.bfloat16, rounding="stochastic")
    whole = lists.run(backend)["params"][0]
    s = lists.copies()
    del s["steps"]
    parts = {name: [x for t in of for x in (t[:cut], t[cut:])] for name, of in s.items()}
    parts["steps"] = [lists.lists.steps[0].clone() for _ in range(2)]
    lists.grads = [lists.grads[0][:cut], lists.grads[0][cut:]]
    lists.lists = lists.lists._replace(groups=[0, 0], element_offsets=[0, cut])
    OP.overloads[backend](*lists.arguments(parts))
    assert torch.equal(torch.cat(parts["params"]), whole)


@on_each
@pytest.mark.parametrize("columns", [5, 16])
def test_an_element_keeps_its_draw_where_its_matrix_is_cut_into_columns(backend, columns):
    rows, width = 37, 33
    lists = Lists((rows * width,), torch.bfloat16, rounding="stochastic")
    lists.lists = lists.lists._replace(element_offsets=[24])
    whole = lists.run(backend)["params"][0].view(rows, width)
    s = lists.copies()
    del s["steps"]
    parts = {
        name: [x.contiguous() for t in of for x in t.view(rows, width).tensor_split([columns], 1)]
        for name, of in s.items()
    }
    parts["steps"] = [lists.lists.steps[0].clone() for _ in range(2)]
    lists.grads = [
        x.contiguous() for x in lists.grads[0].view(rows, width).tensor_split([columns], 1)
    ]
    lists.lists = lists.lists._replace(
        groups=[0, 0],
        element_offsets=[24, 24 + columns],
        runs=[columns, width - columns],
        run_strides=[width, width],
    )
    OP.overloads[backend](*lists.arguments(parts))
    assert torch.equal(torch.cat(parts["params"], 1), whole)


# Scaling, clipping, skipping


@on_each
@dtypes
def test_scale_norm_and_rates_on_the_device(dtype, backend):
    lists = Lists(SMALL, dtype, groups=[group(lr=0.25), group(lr=0.5, decay="l2")], ema=True)
    plain = lists.run(backend)
    # A scale of a power of two, a norm within bounds and the same rates change nothing.
    lists.grads = [g * 4 for g in lists.grads]
    lists.groups = [g._replace(lr=99.0, rate_on_device=True) for g in lists.groups]
    rates = [torch.tensor(r, device=DEVICE) for r in (0.25, 0.5)]
    squares = torch.tensor([9.0, 16.0], dtype=torch.float64, device=DEVICE)
    same = lists.run(
        backend,
        grad_scale=torch.tensor(4.0, device=DEVICE),
        squares=squares,
        max_norm=5.0,
        rates=rates,
        found_inf=torch.tensor(0.0, device=DEVICE),
    )
    for name, tensors in plain.items():
        for x, y in zip(tensors, same[name], strict=True):
            assert torch.equal(x, y), name
    # Unscaled the norm is 5 / 4.
    clipped = lists.run(
        backend,
        grad_scale=torch.tensor(4.0, device=DEVICE),
        squares=squares,
        max_norm=0.625,
        rates=rates,
    )
    lists.grads = [g / 8 for g in lists.grads]
    halved = lists.run(backend, rates=rates)
    # torch divides by the norm and 1e-6, so by a little more than two.
    loose = torch.float32 if dtype == torch.float64 else dtype
    assert_close(clipped, halved, loose, loose)


@on_each
@variants
@pytest.mark.parametrize("found", [1.0, 2.0, math.nan])
def test_found_inf_writes_nothing(variant, found, backend):
    lists = Lists(SMALL, torch.bfloat16, **VARIANTS[variant])
    lists.grads = [torch.full_like(g, math.nan) for g in lists.grads]
    before = lists.copies()
    after = lists.run(backend, found_inf=torch.tensor(found, device=DEVICE))
    for name, tensors in before.items():
        for x, y in zip(tensors, after[name], strict=True):
            assert torch.equal(x, y), name


@on_each
def test_rates_belong_to_the_groups_that_have_them(backend):
    groups = [group(lr=r) for r in (0.1, 0.2, 0.3, 0.4)]
    lists = Lists((5, 6, 7, 8), torch.float32, groups=groups)
    plain = lists.run(backend)
    for i in (1, 3):
        lists.groups[i] = groups[i]._replace(lr=math.nan, rate_on_device=True)
    rates = [torch.tensor(r, device=DEVICE) for r in (0.2, 0.4)]
    for x, y in zip(plain["params"], lists.run(backend, rates=rates)["params"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_clip_factor_and_soft_threshold():
    assert clip_factor(0.0, 1.0) == 1.0
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(4.0, 0.0) == 0.0
    assert math.isnan(clip_factor(math.nan, 1.0))
    assert clip_factor(math.inf, 1.0) == 0.0
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.5, 1.0, 1.5, math.inf, math.nan])
    y = soft_threshold(x, 1.0)
    assert y[:8].tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, math.inf]
    assert y[8].isnan()
    assert not torch.signbit(y[1:4]).any()


@on_each
def test_sgd_takes_its_first_gradient_as_it_is(backend):
    # Whatever lies in the buffer, and whatever the dampening.
    lists = Lists((5,), torch.float32, algorithm="sgd", groups=[group(beta2=0.5, weight_decay=0.0)])
    lists.lists.first_moments[0].fill_(math.nan)
    lists.lists.steps[0].zero_()
    after = lists.run(backend)
    assert torch.equal(after["first"][0], lists.grads[0])
    assert float(after["steps"][0]) == 1


# The table


def test_the_tables_layout():
    sizes = [3, 0, CHUNK, CHUNK + 1, 64]
    table = TensorTable(
        sizes,
        torch.device("cpu"),
        (torch.float32, torch.bfloat16),
        param=[10, 11, 12, 13, 14],
        group=[0, 1, 2, 3, 4],
    )
    assert table.count == 5
    # What the seal says: dtypes, groups, the rows that were given.
    assert table.seal % 2**25 == 1 | 3 << 2 | 5 << 4 | (2 + 4096) << 10
    assert table.chunks == 1 + 0 + 1 + 2 + 1
    assert table.scratch.numel() == 1 + table.chunks
    assert table.data.numel() == len(ROWS) * 5 + table.chunks
    rows = dict(zip(ROWS, table.data[: len(ROWS) * 5].view(-1, 5).tolist(), strict=True))
    assert rows["numel"] == sizes
    assert rows["param"] == [10, 11, 12, 13, 14]
    assert rows["grad"] == [0] * 5
    assert rows["first_chunk"] == [0, 1, 1, 2, 4]
    works = [work_units(n) for n in sizes]
    assert rows["first_work"] == [sum(works[:i]) for i in range(5)]
    assert table.data[len(ROWS) * 5 :].tolist() == [0, 2, 3, 3, 4]
    table.row("grad")[:] = array("q", [5, 4, 3, 2, 1])
    table.send("grad")
    assert table.data[:5].tolist() == [5, 4, 3, 2, 1]
    assert table.data[5:10].tolist() == [10, 11, 12, 13, 14]
    assert work_units(0) == 64
    assert work_units(1) == work_units(64) == 128
    empty = TensorTable([], torch.device("cpu"), (torch.float32,))
    assert (empty.count, empty.chunks, empty.data.numel()) == (0, 0, 0)


@on_each
def test_a_prepared_step_is_the_op(backend):
    lists = Lists(SMALL, torch.float32, amsgrad=True, ema=True)
    expected = lists.run(backend)
    prepared = PreparedStep("adam", lists.lists)
    assert prepared.backend(backend) == backend
    versions = [p._version for p in lists.lists.params]
    prepared.run(lists.grads, backend, lists.common())
    for name, tensors in lists.state().items():
        for x, y in zip(tensors, expected[name], strict=True):
            assert torch.equal(x, y), name
    assert all(p._version > v for p, v in zip(lists.lists.params, versions, strict=True))
    # Other gradients, elsewhere.
    grads = [torch.full_like(g, 0.5) for g in lists.grads]
    lists.grads = grads
    expected = lists.run(backend)
    prepared.table.row("grad")[:] = array("q", [g.data_ptr() for g in grads])
    prepared.table.send("grad")
    prepared.run(grads, backend, lists.common())
    for x, y in zip(lists.lists.params, expected["params"], strict=True):
        assert torch.equal(x, y)


@on_each
def test_no_elements_at_all(backend):
    lists = Lists((0, 0), torch.float32)
    assert all(float(s) > 0 for s in lists.run(backend)["steps"])


# Registration


@on_each
@pytest.mark.parametrize("variant", ["amsgrad", "nesterov", "sgd", "kahan", "average"])
def test_opcheck(backend, variant):
    dtype = torch.bfloat16 if variant == "kahan" else torch.float32
    lists = Lists((3, 5), dtype, **VARIANTS[variant])
    opcheck(
        OP.overloads[backend],
        lists.arguments(
            grad_scale=torch.tensor(2.0, device=DEVICE),
            found_inf=torch.tensor(0.0, device=DEVICE),
            squares=torch.ones(1, dtype=torch.float64, device=DEVICE),
            max_norm=1.0,
        ),
    )


@on_each
def test_what_saved_a_parameter_knows_that_it_has_changed(backend):
    lists = Lists((3, 5), torch.float32)
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = (x * lists.lists.params[0]).sum()
    OP.overloads[backend](*lists.arguments())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@on_each
def test_what_is_averaged_is_not_changed(backend):
    lists = Lists((3, 5), torch.float32, **VARIANTS["average"])
    before = [(p.clone(), p._version, e.clone()) for p, e in _pairs(lists)]
    OP.overloads[backend](*lists.arguments())
    for i, ((p, e), (p_before, version, e_before)) in enumerate(
        zip(_pairs(lists), before, strict=True)
    ):
        assert torch.equal(p, p_before)
        assert p._version == version
        decay = (0.75, 0.25)[i]
        torch.testing.assert_close(e, decay * e_before + (1 - decay) * p)


def _pairs(lists):
    return zip(lists.lists.params, lists.lists.emas, strict=True)


def test_averages_are_needed_where_nothing_else_is_done():
    lists = Lists((3,), torch.float32, algorithm="average")
    if implementations()[0].marks:
        pytest.skip("the native library was not built")
    with pytest.raises(RuntimeError, match="emas must be 1 tensors, one for each parameter, got 0"):
        OP.overloads["native"](*lists.arguments())


def test_flags_and_numbers():
    for decay in DECAYS:
        for maximize in (False, True):
            for nesterov in (False, True):
                g = group(decay=decay, maximize=maximize, nesterov=nesterov)
                flags = DECAYS.index(decay) + 4 * maximize + 8 * nesterov
                assert g.flags() == flags
                assert g._replace(rate_on_device=True).flags() == flags + 16
    assert group().numbers() == (0.1, 0.5, 0.2, 0.0, 0.9, 0.99, 1e-3, 0.75)


# Bad input of the native part


@native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": []}, "rates must be one for each group"),
        ({"rates": [torch.ones(2)]}, "rates must be a tensor of one element"),
        ({"rates": [torch.ones((), dtype=torch.float64)]}, "rates must be a tensor of one"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be a tensor of one element"),
        ({"grad_scale": torch.ones((), dtype=torch.float64)}, "grad_scale must be"),
        ({"found_inf": torch.ones((), dtype=torch.bool)}, "found_inf must be"),
        ({"squares": torch.ones(1), "max_norm": 1.0}, "squares must be contiguous float64"),
        ({"rng_state": torch.ones(2)}, "rng_state"),
    ],
    ids=str,
)
def test_bad_arguments_change_nothing(changes, message):
    groups = [group(rate_on_device="rates" in changes)]
    lists = Lists((3, 5), torch.float32, groups=groups)
    state = lists.copies()
    with pytest.raises(RuntimeError, match=message):
        OP.overloads["native"](*lists.arguments(state, **changes))
    for name, tensors in lists.state().items():
        for x, y in zip(tensors, state[name], strict=True):
            assert torch.equal(x, y)


@native
def test_bad_tables():
    lists = Lists((3, 5), torch.float32)
    table = lists.lists.table()
    op = torch.ops.reg_kernels.optimizer_step_table.default
    common = [lists.lists.dtypes(), *lists.common(), table.scratch]
    good = [table.data, table.count, table.seal, 0, *common]
    for place, bad, message in (
        (0, table.data.double(), "table must be int64 of 15 rows of 2"),
        (0, table.data[:10], "table must be int64 of 15 rows of 2"),
        (0, table.data.clone(), "table must be a TensorTable of this process"),
        (1, 200, "table must be int64 of 15 rows of 200"),
        (1, -1, "table must be int64 of 15 rows of -1"),
        (1, 2**63 - 1, "table must be int64 of 15 rows of"),
        (1, 1, "table must be a TensorTable of this process"),
        (3, 3, "algorithm must be 0, 1 or 2, got 3"),
        (3, 2, "table must be one with row 5"),
        (4, [9, 1], "dtype must be the table's, 1, got 9"),
        (4, [1], "dtypes must be the parameters' and the moments'"),
        (4, [1, 3], "dtype must be the table's, 1, got 3"),
        (5, [0.0] * 7, "numbers must be 8 for each of 1 groups, got 7"),
        (6, [3], "flags must be a decay, 0 to 2, and bits up to 16, got 3"),
        (8, 3, "rounding must be 0, 1 or 2, got 3"),
    ):
        arguments = [*good[:place], bad, *good[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    lists = Lists((3, 5), torch.bfloat16, rounding="stochastic")
    table = lists.lists.table()
    *common, _ = lists.common()
    with pytest.raises(RuntimeError, match="rng_state must be given for stochastic rounding"):
        op(
            *(table.data, table.count, table.seal, 0, lists.lists.dtypes(), *common, None),
            table.scratch,
        )


@native
def test_threads_are_given_back():
    # The op leaves torch's thread count as it was.
    threads = torch.get_num_threads()
    Lists((100_003,), torch.float32).run("native")
    assert torch.get_num_threads() == threads <= (os.cpu_count() or 1)
