"""The optimizer step's Triton kernels: every way through them against the reference, and their
parts by themselves."""

import itertools
import math

import pytest
import torch

from reg_kernels._tensor_table import CHUNK
from reg_kernels.ops.optimizer_step import OP, Hyperparameters, StepLists

from support import DEVICE, DTYPE_IDS, DTYPES, rng_state

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from reg_kernels.triton import optimizer_step as kernels  # noqa: E402
from reg_kernels.triton._optimizer_rule import power, stochastic_bfloat16  # noqa: E402

INTERPRETED = DEVICE == "cpu"
ADAM, SGD = 0, 1
NEAREST, STOCHASTIC, KAHAN = 0, 1, 2
FLOAT, BFLOAT = torch.float32, torch.bfloat16
# Less than a vector, vectors and a rest, of none; more than one block.
SIZES = (5, 0, 67, 2100)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
algorithms = pytest.mark.parametrize("algorithm", [ADAM, SGD], ids=["adam", "sgd"])

# The interpreter's numpy speaks up where a kernel meets Inf - Inf or divides by zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def group(**changes):
    values = {
        **{"lr": 0.1, "decay_lr": 0.5, "weight_decay": 0.2, "l1": 0.0, "beta1": 0.9},
        **{"beta2": 0.99, "eps": 1e-3, "ema_decay": 0.75, "decay": "decoupled"},
        **{"maximize": False, "nesterov": False},
    }
    return Hyperparameters(**(values | changes))


class Case:
    """Parameters with state, and gradients; `run` steps copies of them by an implementation."""

    def __init__(
        self,
        algorithm=ADAM,
        dtype=FLOAT,
        moments=None,
        sizes=SIZES,
        groups=None,
        rounding=NEAREST,
        amsgrad=False,
        momentum=True,
        ema=False,
        misaligned="",
    ):
        moments, compute = moments or dtype, torch.promote_types(dtype, FLOAT)
        self.algorithm, self.rounding, self.misaligned = algorithm, rounding, misaligned
        self.dtype = dtype
        self.groups = groups or [group()]
        stateful = algorithm == ADAM or momentum
        kinds = {
            "params": dtype,
            "grads": dtype,
            "first_moments": moments if stateful else None,
            "second_moments": moments if algorithm == ADAM else None,
            "max_second_moments": moments if amsgrad else None,
            "emas": compute if ema else None,
            "compensations": dtype if rounding == KAHAN else None,
        }
        self.tensors = {}
        for name, kind in kinds.items():
            new = [torch.randn(n, dtype=torch.float64) for n in sizes if kind is not None]
            if "second" in name:
                new = [x.square() for x in new]
            if name == "compensations":
                new = [x * torch.finfo(dtype).eps / 8 for x in new]
            self.tensors[name] = [x.to(kind) for x in new]
        self.tensors["steps"] = [torch.tensor(float(i % 3)) for i in range(len(sizes))]
        if not stateful:
            self.tensors["steps"] = []
        self.tensor_groups = [i % len(self.groups) for i in range(len(sizes))]
        rounded_up = [-(-n // 8) * 8 for n in sizes]
        self.element_offsets = list(itertools.accumulate([64, *rounded_up[:-1]]))
        self.runs, self.run_strides = [], []

    def copies(self):
        """On the device, 16-byte aligned but for those that are not to be."""

        def copy(x, shift):
            memory = torch.empty(x.numel() + shift, dtype=x.dtype, device=DEVICE)
            return memory[shift:].view(x.shape).copy_(x)

        return {
            k: [copy(x, int(k == self.misaligned)) for x in of] for k, of in self.tensors.items()
        }

    def run(self, backend, steps=1, **common):
        """The state after `steps` equal steps. `common`: rates, squares, max_norm, ..."""
        state = self.copies()
        if self.rounding == STOCHASTIC:
            common = {"rng_state": rng_state()} | common
        for _ in range(steps):
            OP.overloads[backend](
                *(self.algorithm, state["params"], state["grads"], state["steps"]),
                *(state["first_moments"], state["second_moments"], state["max_second_moments"]),
                *(state["emas"], state["compensations"]),
                *(self.tensor_groups, self.element_offsets, self.runs, self.run_strides),
                [x for g in self.groups for x in g.numbers()],
                [g.flags() for g in self.groups],
                *(common.get("rates", []), self.rounding, common.get("squares")),
                *(common.get("max_norm", 0.0), common.get("grad_scale"), common.get("found_inf")),
                common.get("rng_state"),
            )
        return state

    def check(self, steps=1, **common):
        """Triton's state against the reference's; returns the former."""
        ours, theirs = (self.run(b, steps, **common) for b in ("triton", "reference"))
        for name, tensors in ours.items():
            for i, (x, y) in enumerate(zip(tensors, theirs[name], strict=True)):
                # A NaN has its place, whatever its bits.
                assert torch.equal(x.isnan(), y.isnan()), name
                if name == "compensations":
                    # Where the parameter went to its other neighbour, so did what is left of it.
                    x, y = (s["params"][i].double() + s[name][i].double() for s in (ours, theirs))
                    unit = 8 * torch.finfo(self.dtype).eps ** 2
                elif name == "params" and self.rounding == KAHAN:
                    unit = torch.finfo(self.dtype).eps
                else:
                    unit = tolerance(x.dtype, self.dtype)
                torch.testing.assert_close(x, y, rtol=unit, atol=unit, equal_nan=True, msg=name)
        return ours


def tolerance(dtype, params):
    """A few roundings of the type that is computed in, and one of that it is kept in."""
    unit = 8 * torch.finfo(torch.promote_types(params, FLOAT)).eps
    if dtype.itemsize == 2:
        # The interpreter truncates to bfloat16: up to one unit below what is rounded to nearest.
        unit += torch.finfo(dtype).eps
    return unit


# Values

VARIANTS = {
    "adamw": {},
    "adam, maximize": {"groups": [group(decay="l2", maximize=True)]},
    "small beta": {"groups": [group(beta1=0.3, beta2=0.0, decay="decoupled_lr")]},
    "amsgrad, ema, l1": {"amsgrad": True, "ema": True, "groups": [group(l1=0.5)]},
    "sgd": {"algorithm": SGD, "momentum": False, "ema": True},
    "momentum, l1": {"algorithm": SGD, "groups": [group(beta2=0.3, l1=0.5)]},
    "nesterov": {
        "algorithm": SGD,
        "groups": [group(beta2=0.0, nesterov=True, decay="l2", maximize=True)],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@dtypes
def test_variants(dtype, variant):
    Case(dtype=dtype, **VARIANTS[variant]).check(steps=2 if dtype.itemsize > 2 else 1)


@pytest.mark.parametrize(
    ("dtype", "moments"), [(FLOAT, BFLOAT), (BFLOAT, FLOAT), (torch.float16, FLOAT)], ids=str
)
def test_moments_of_another_type(dtype, moments):
    Case(dtype=dtype, moments=moments, amsgrad=True, ema=True).check()


@pytest.mark.parametrize(
    "array",
    [*("params", "grads", "first_moments", "second_moments", "max_second_moments", "emas")],
)
def test_one_array_that_is_misaligned(array):
    Case(dtype=FLOAT, sizes=(67, 300), amsgrad=True, ema=True, misaligned=array).check()


@pytest.mark.parametrize("moments", [BFLOAT, FLOAT])
@algorithms
def test_kahan(algorithm, moments):
    case = Case(algorithm, BFLOAT, moments, rounding=KAHAN, groups=[group(lr=1e-3)])
    ours = case.check(steps=3 if moments == FLOAT else 1)
    assert any((x != 0).any() for x in ours["compensations"])
    case.misaligned = "compensations"
    case.check()


def test_more_than_one_chunk():
    Case(sizes=(3, CHUNK + 70, 17), dtype=BFLOAT, moments=FLOAT, ema=True).check()


def test_infinities_and_nans_go_where_they_should():
    for algorithm, decay in itertools.product([ADAM, SGD], ["decoupled", "l2"]):
        case = Case(algorithm, sizes=(20,), amsgrad=algorithm == ADAM, ema=True)
        case.groups = [group(decay=decay, weight_decay=0.0, l1=0.1)]
        for name, tensors in case.tensors.items():
            if name != "steps" and tensors:
                i = list(case.tensors).index(name)
                tensors[0][2 * i] = math.nan
                tensors[0][2 * i + 1] = math.inf
        case.check()


def test_without_momentum_the_first_moment_is_the_gradient():
    case = Case(sizes=(33,), groups=[group(beta1=0.0)])
    case.tensors["first_moments"][0] *= 1e8
    assert torch.equal(case.check()["first_moments"][0].cpu(), case.tensors["grads"][0])


def test_the_l1_penalty_makes_exact_zeros():
    ours = Case(groups=[group(l1=3.0)]).check()
    assert int((ours["params"][-1] == 0).sum()) > 200


# Groups and rates


@pytest.mark.parametrize("capturing", [False, True])
@algorithms
def test_groups(algorithm, capturing, monkeypatch):
    groups = [
        group(lr=0.3, decay="decoupled_lr", l1=0.01),
        group(decay="l2", beta1=0.2, maximize=True),
        group(nesterov=True, beta2=0.7, eps=1e-8, ema_decay=0.1),
    ]
    on_device = kernels._on_device
    monkeypatch.setattr(kernels, "_on_device", lambda *a: on_device(*a[:3], capturing))
    case = Case(algorithm, torch.float64, sizes=(5, 20, 33, 9), groups=groups, ema=True)
    case.check()


def test_rates_on_the_device():
    rates = [torch.tensor(0.25, device=DEVICE), torch.tensor([0.125], device=DEVICE)]
    on_device = {"lr": 7.0, "rate_on_device": True}  # a number that is not to be looked at
    one = [group(**on_device, decay="decoupled_lr")]
    case = Case(dtype=torch.float64, sizes=(5, 33), groups=one)
    ours = case.check(rates=rates[:1])
    case.groups = [group(lr=0.25, decay="decoupled_lr")]
    for x, y in zip(ours["params"], case.run("triton")["params"], strict=True):
        assert torch.equal(x, y)
    three = [group(lr=0.5), *(group(**on_device) for _ in range(2))]
    Case(dtype=torch.float64, sizes=(5, 6, 33), groups=three).check(rates=rates)


# Scaling, clipping, skipping


def on_device(value, dtype=FLOAT):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_scale_and_norm(max_norm):
    common = {
        "squares": on_device([30.0, 0.0, 6.0], torch.float64),
        "grad_scale": on_device(2.0),
        "max_norm": max_norm,
    }
    case = Case(SGD, torch.float64, sizes=(33,))
    ours = case.check(**common)
    case.tensors["grads"][0] *= 0.5 * min(1.0, max_norm / (3 + 1e-6))
    torch.testing.assert_close(ours["params"], case.run("triton")["params"])


def test_a_norm_that_is_nan():
    common = {"squares": on_device([math.nan], torch.float64), "max_norm": 1.0}
    ours = Case(SGD, sizes=(33,)).check(**common)
    assert ours["params"][0].isnan().all()


def test_found_inf_changes_nothing():
    case = Case(amsgrad=True, ema=True, sizes=(5, 33))
    before = case.copies()
    after = case.run("triton", found_inf=on_device([1.0]))
    for name, tensors in after.items():
        for x, y in zip(tensors, before[name], strict=True):
            assert torch.equal(x, y), name
    case.check(found_inf=on_device([0.0]))


# Steps


def step_table(case, state):
    """A table that is kept, and what steps it: the ticket has to be back each time."""
    lists = StepLists(
        *(state["params"], state["grads"], state["steps"]),
        *(state["first_moments"], state["second_moments"]),
        *(state["max_second_moments"], state["emas"], state["compensations"]),
        *(case.tensor_groups, case.element_offsets),
    )
    table = lists.table()

    def run(found_inf=None):
        kernels.optimizer_step_table(
            *(table.data, table.count, table.seal, case.algorithm, lists.dtypes()),
            *(
                case.groups[0].numbers(),
                [case.groups[0].flags()],
                [],
                case.rounding,
                None,
                0.0,
                None,
                found_inf,
                None,
            ),
            table.scratch,
        )

    return table, run


def test_a_table_that_is_used_again():
    case = Case(sizes=(3, CHUNK + 9, 17))
    state = case.copies()
    table, run = step_table(case, state)
    for found in (None, on_device([1.0]), on_device([0.0])):
        run(found)
        assert not table.scratch.any()
    for name, tensors in case.run("reference", steps=2).items():
        unit = tolerance(FLOAT, FLOAT)
        torch.testing.assert_close(state[name], tensors, rtol=unit, atol=unit)


def test_steps_of_tensors_without_an_element(monkeypatch):
    monkeypatch.setattr(kernels, "STEPS", 4)  # so that one go does not take them
    ours = Case(sizes=(0,) * 7).check()
    assert [float(x) for x in ours["steps"]] == [1 + i % 3 for i in range(7)]
    Case(sizes=(0, 3, 0, 0, 4, 1)).check()


@triton.jit
def power_kernel(out_ptr, in_ptr):
    """out = in[0]^in[1], in float64."""
    base, exponent = tl.load(in_ptr), tl.load(in_ptr + 1).to(tl.int64)
    tl.store(out_ptr, power(base, exponent))


@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000, 65_537, 2**24])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_powers_leave_the_bias_corrections_exact(beta, step):
    out = torch.empty(1, dtype=torch.float64, device=DEVICE)
    power_kernel[(1,)](out, on_device([beta, step], torch.float64))
    # As one rounding of the power already moves it; at 0.999 and step 1 within 1e-12.
    bound = 2**-52 / (1 - beta)
    assert 1 - float(out) == pytest.approx(1 - math.pow(beta, step), rel=bound, abs=0.0)


# Stochastic rounding


@triton.jit
def stochastic_kernel(out_ptr, in_ptr, drawn_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    rounded = stochastic_bfloat16(tl.load(in_ptr + i), tl.load(drawn_ptr + i))
    tl.store(out_ptr + i, rounded)


def test_stochastic_rounding_takes_one_of_the_neighbours_by_the_draw():
    special = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45, 1e-39]
    x = torch.cat([torch.tensor(special), torch.randn(256 - len(special))])
    # NaNs that a carry would make a number of, and that lose all that is theirs with the low bits.
    x.view(torch.int32)[-2:] = torch.tensor([-1, 0x7F800001], dtype=torch.int32)
    drawn = torch.randint(2**16, (256,), dtype=torch.int32)
    drawn[: len(special)] = 0xFFFF
    drawn[-2:] = torch.tensor([0xFFFF, 0], dtype=torch.int32)
    out = torch.empty(256, dtype=BFLOAT, device=DEVICE)
    stochastic_kernel[(1,)](out, x.to(DEVICE), drawn.to(DEVICE), BLOCK=256)
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    sums = torch.where(x.isfinite(), bits + drawn, bits)
    expected = ((sums >> 16) - ((sums >> 31) << 16)).to(torch.int16).view(BFLOAT)
    expected[x.isnan()] = math.nan
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    kept = [i for i, value in enumerate(special) if value in (0.0, 1.0, -1.5)]
    assert torch.equal(out.cpu()[kept].float(), x[kept])
    assert math.copysign(1.0, float(out[1])) == -1.0


@pytest.mark.parametrize("misaligned", ["", "grads"])
def test_stochastic_rounding_draws_as_the_reference(misaligned):
    # SGD without momentum has nothing else to round: the same bits.
    case = Case(SGD, BFLOAT, sizes=(5, 67, 2100), momentum=False, rounding=STOCHASTIC)
    case.groups = [group(lr=0.5, weight_decay=0.0)]  # exact in float32
    case.misaligned = misaligned
    ours, theirs = (case.run(b)["params"] for b in ("triton", "reference"))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
    other = case.run("triton", rng_state=rng_state() + 1)["params"]
    assert not torch.equal(ours[-1], other[-1])


def test_stochastic_rounding_of_shards_draws_as_the_reference():
    # Of draws that do not begin with a group's first; of runs, as of a shard of another dimension.
    case = Case(SGD, BFLOAT, sizes=(5, 67, 2100, 300), momentum=False, rounding=STOCHASTIC)
    case.groups = [group(lr=0.5, weight_decay=0.0)]  # exact in float32
    case.element_offsets = [3, 16, 2**35 + 1, 5]
    case.runs, case.run_strides = [0, 0, 7, 16], [0, 0, 50, 33]
    ours, theirs = (case.run(b)["params"] for b in ("triton", "reference"))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_stochastic_rounding_of_the_second_chunk():
    case = Case(SGD, BFLOAT, sizes=(CHUNK + 40,), momentum=False, rounding=STOCHASTIC)
    case.groups = [group(lr=0.5, weight_decay=0.0)]
    assert torch.equal(*(case.run(b)["params"][0] for b in ("triton", "reference")))


def test_other_types_have_nothing_to_round_stochastically():
    case = Case(dtype=FLOAT, sizes=(33,), rounding=STOCHASTIC)
    ours = case.run("triton")["params"]
    case.rounding = NEAREST
    assert torch.equal(ours[0], case.run("triton")["params"][0])
