"""Attacks: what they find, and what they leave."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

import reg_kernels
from reg_kernels import adversarial
from reg_kernels import nn as fused
from reg_kernels.adversarial import FGSM, PGD, FreeAdversarial, trades_loss
from reg_kernels.augment import MixedTarget

from support import DEVICE

NORMS = ("linf", "l2", "l1")
each_norm = pytest.mark.parametrize("norm", NORMS)
EPS = {"linf": 0.1, "l2": 0.7, "l1": 4.0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net(*layers):
    """Of images (N, 3, 4, 4); 5 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).to(DEVICE)


def batch(n=6):
    return torch.rand(n, 3, 4, 4, device=DEVICE), torch.randint(5, (n,), device=DEVICE)


def losses(model, x, y):
    return nn.functional.cross_entropy(model(x), y, reduction="none").detach()


def lengths(way, norm):
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    return torch.linalg.vector_norm(way.flatten(1), order, 1)


# What they find


@each_norm
def test_it_finds_higher_losses_in_the_ball(norm):
    model, (x, y) = net(), batch()
    for kind in (FGSM, PGD):
        for random_start in (False, True):
            options = {"step_size": EPS[norm] / 4} if kind is PGD else {}
            attack = kind(model, EPS[norm], norm=norm, random_start=random_start, **options)
            adv = attack(x, y)
            assert (lengths(adv - x, norm) <= EPS[norm] * (1 + 1e-5)).all()
            assert adv.min() >= 0 and adv.max() <= 1 and not adv.requires_grad
            assert (losses(model, adv, y) > losses(model, x, y)).all()


def test_it_is_the_plain_loop():
    model, (x, y) = net(), batch()
    adv, eps, step = x.clone(), 8 / 255, 2 / 255
    for _ in range(10):
        adv.requires_grad_()
        loss = nn.functional.cross_entropy(model(adv), y)
        adv = adv.detach() + step * torch.autograd.grad(loss, adv)[0].sign()
        adv = (x + (adv - x).clamp(-eps, eps)).clamp(0, 1)
    found = PGD(model, random_start=False)(x, y)
    torch.testing.assert_close(found, adv, rtol=0, atol=1e-6)


def test_as_torchattacks_has_it():
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = net().eval(), batch()
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)
    torch.testing.assert_close(
        PGD(model, random_start=False)(x, y), theirs(x, y), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(FGSM(model)(x, y), torchattacks.FGSM(model)(x, y), rtol=0, atol=1e-6)
    theirs = torchattacks.PGDL2(model, eps=1.0, alpha=0.2, steps=10, random_start=False)
    ours = PGD(model, 1.0, 0.2, 10, "l2", random_start=False)(x, y)
    torch.testing.assert_close(ours, theirs(x, y), rtol=0, atol=1e-5)


def test_targeted_and_without_labels():
    model, (x, _) = net(), batch()
    target = (model(x).argmax(1) + 1) % 5
    adv = PGD(model, 0.3, 0.1, targeted=True)(x, target)
    assert (losses(model, adv, target) < losses(model, x, target)).all()
    predicted = PGD(model, random_start=False)(x)
    assert torch.equal(predicted, PGD(model, random_start=False)(x, model(x).argmax(1)))
    with pytest.raises(TypeError, match="PGD: target must be given where the attack is targeted"):
        PGD(model, targeted=True)(x)


def test_restarts_take_the_worst_of_each_sample():
    model, (x, y) = net(nn.Tanh()), batch()
    torch.manual_seed(1)
    few = [PGD(model, 0.2, 0.05, 2)(x, y) for _ in range(4)]
    torch.manual_seed(1)
    best = PGD(model, 0.2, 0.05, 2, restarts=4)(x, y)
    most = torch.stack([losses(model, adv, y) for adv in few]).amax(0)
    torch.testing.assert_close(losses(model, best, y), most)


def test_other_losses_and_targets():
    model, (x, y) = net(), batch()
    options = {"random_start": False}
    own = PGD(model, loss=lambda logits, y: -logits.gather(1, y[:, None]).squeeze(1), **options)
    assert (losses(model, own(x, y), y) > losses(model, x, y)).all()
    plain = PGD(model, **options)(x, y)
    summed = PGD(model, loss=nn.CrossEntropyLoss(reduction="sum"), **options)
    torch.testing.assert_close(summed(x, y), plain, rtol=0, atol=1e-6)
    for target in (nn.functional.one_hot(y, 5).float(), MixedTarget(y, y.flip(0), 1.0)):
        torch.testing.assert_close(PGD(model, **options)(x, target), plain, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="PGD: loss must be of one number for each of the 6"):
        PGD(model, loss=nn.CrossEntropyLoss(), restarts=2)(x, y)


@each_norm
def test_pixels_of_normalised_inputs(norm):
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.25, 0.5)
    m, s = (torch.tensor(v, device=DEVICE).view(3, 1, 1) for v in (mean, std))
    model, (x, y) = net().double(), batch()
    x, m, s = x.double(), m.double(), s.double()
    in_pixels = lambda v: model((v - m) / s)  # noqa: E731
    options = {"step_size": EPS[norm] / 4, "norm": norm, "generator": torch.Generator(DEVICE)}
    options["generator"].manual_seed(3)
    plain = PGD(in_pixels, EPS[norm], **options)(x, y)
    options["generator"].manual_seed(3)
    found = PGD(model, EPS[norm], mean=m.flatten(), std=s.flatten(), **options)((x - m) / s, y)
    torch.testing.assert_close(found * s + m, plain, rtol=0, atol=1e-6)


# Random starts


@each_norm
@pytest.mark.parametrize("d", [1, 3])
def test_starts_are_uniform_in_the_ball(norm, d):
    n = 20_000
    x = torch.full((n, d), 0.5, device=DEVICE)
    eps = torch.linspace(0.1, 0.3, n, device=DEVICE)
    attack = PGD(lambda x: x.sum(1, keepdim=True) * x.new_ones(1, 2), eps, 0.0, 1, norm)
    way = (attack(x, torch.zeros(n, dtype=torch.int64, device=DEVICE)) - x) / eps[:, None]
    # Of a ball's volume a share of r^d lies within r.
    shares = lengths(way, norm).pow(d).sort().values
    distance = (shares - torch.linspace(0, 1, n, device=DEVICE)).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov, one in a thousand
    assert way.mean(0).abs().max() < 4 / n**0.5
    if norm == "l1" and d == 3:  # given its share, each coordinate has the same one
        assert (way.abs().mean(0) - 0.25).abs().max() < 4 / n**0.5


# What they leave


def training_net(kind):
    """A net in training mode that has BatchNorm, of torch or fused, and dropout."""
    model = net(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
    if kind == "fused":
        reg_kernels.convert(model, fuse=True)
    if kind == "act":
        act = fused.BatchNormAct2d(8, drop=0.3)
        model = net(act)
    return model.to(DEVICE).train()


@pytest.mark.parametrize("kind", ["torch", "fused", "act"])
@pytest.mark.parametrize("dropout", [True, False])
def test_no_trace(kind, dropout):
    model, (x, y) = training_net(kind), batch()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model)
    random, given = torch.get_rng_state(), x.clone()
    for attack in (
        PGD(model, steps=2, dropout=dropout, preserve_rng_state=True, restarts=2),
        lambda x, y: trades_loss(model, x, y, perturb_steps=2, dropout=dropout).detach(),
    ):
        torch.set_rng_state(random)
        attack(x, y)
        if isinstance(attack, PGD):
            assert torch.equal(torch.get_rng_state(), random)
            for (name, one), two in zip(
                model.state_dict().items(), before.state_dict().values(), strict=True
            ):
                assert torch.equal(one, two), name
    for one, two in zip(model.modules(), before.modules(), strict=True):
        assert one.training is two.training and vars(one).get("drop") == vars(two).get("drop")
        assert vars(one).get("p") == vars(two).get("p")
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert p.grad is None if name != "0.weight" else (p.grad == 1).all()
    assert torch.equal(x, given) and not x.requires_grad


@pytest.mark.parametrize("kind", ["torch", "fused", "act"])
def test_dropout_as_asked(kind):
    model, (x, y) = training_net(kind), batch()
    attack = PGD(model, 0.2, 0.05, 3, random_start=False)
    assert not torch.equal(attack(x, y), attack(x, y))
    attack = PGD(model, 0.2, 0.05, 3, random_start=False, dropout=False)
    random = torch.get_rng_state()
    assert torch.equal(attack(x, y), attack(x, y))
    assert torch.equal(torch.get_rng_state(), random)


def test_what_drops_beside_dropout():
    inner = nn.Conv2d(8, 8, 1)
    kinds = [fused.StochasticDepthBlock(inner, 0.5, mode) for mode in ("batch", "subset", "row")]
    for layer in (*kinds, fused.GaussianDropout(0.5), fused.StochasticDepth(0.5, "row")):
        model, (x, y) = net(layer), batch()
        random = torch.get_rng_state()
        PGD(model, random_start=False, steps=2, dropout=False)(x, y)
        assert torch.equal(torch.get_rng_state(), random)
        assert layer.training


def test_a_buffer_that_a_forward_replaces():
    class Counts(nn.Flatten):
        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    layer = Counts()
    layer.register_buffer("calls", torch.zeros((), device=DEVICE))
    before = layer.calls
    PGD(nn.Sequential(layer, nn.Linear(48, 5, device=DEVICE)), steps=2)(*batch())
    assert layer.calls is before and before == 0


def test_a_graph_from_before_is_not_disturbed():
    for frozen in (False, True):
        model, (x, y) = net(nn.BatchNorm2d(8)), batch()
        model[1].train(not frozen)
        expected = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
        output = model(x)
        PGD(model, steps=2)(x, y)
        found = torch.autograd.grad(output.square().sum(), model[0].weight)[0]
        torch.testing.assert_close(found, expected)


def test_buffers_are_put_back_when_the_model_raises():
    model, (x, y) = net(nn.BatchNorm2d(8), nn.Dropout(0.5)).train(), batch()
    before = copy.deepcopy(model.state_dict())

    def fails(logits, y):
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        PGD(model, loss=fails, dropout=False)(x, y)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    assert all(layer.training for layer in model.modules())


def test_where_gradients_are_off_and_under_autocast():
    model, (x, y) = net(nn.BatchNorm2d(8)).eval(), batch()
    attack = PGD(model, random_start=False)
    expected = attack(x, y)
    with torch.no_grad():
        assert torch.equal(attack(x, y), expected)
    with torch.inference_mode():
        assert torch.equal(attack(x.clone(), y), expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        adv = attack(x, y)
    assert adv.dtype == torch.float32 and (adv - expected).abs().max() <= 16.01 / 255
    half = PGD(model.bfloat16(), random_start=False)(x.bfloat16(), y)
    assert half.dtype == torch.bfloat16
    assert (half.float() - x.bfloat16().float()).abs().max() <= 8 / 255


def test_a_compiled_model():
    model, (x, y) = net(fused.BatchNorm2d(8)).train(), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    before = copy.deepcopy(model.state_dict())
    expected = PGD(model, random_start=False)(x, y)
    found = PGD(compiled, random_start=False)(x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/x", rank=0, world_size=1)
    try:
        model, (x, y) = net(nn.BatchNorm2d(8)).train(), batch()
        parallel, syncs = nn.parallel.DistributedDataParallel(model), []
        parallel.register_forward_hook(lambda *_: syncs.append(parallel.require_backward_grad_sync))
        expected = PGD(model, random_start=False)(x, y)
        for _ in range(2):
            syncs.clear()
            adv = PGD(parallel, random_start=False)(x, y)
            assert syncs == [False] * 10  # nothing is exchanged for it
            torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)
            nn.functional.cross_entropy(parallel(adv), y).backward()
            assert syncs[-1]
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_no_samples():
    x, y = batch(0)
    assert PGD(net(), restarts=2)(x, y).shape == x.shape


# Training by them


def test_free_training_steps_by_the_gradients_of_training():
    model, (x, y) = net(), batch()
    free = FreeAdversarial(0.1, 3, 0.04)
    seen, before = [], x.clone()
    for adv in free(x):
        seen.append(adv.detach().clone())
        (1e30 * nn.functional.cross_entropy(model(adv), y)).backward()
        assert (adv.detach() == seen[-1]).all() and adv.grad is not None
    assert len(seen) == 3 and torch.equal(seen[0], x) and torch.equal(x, before)
    last = adv.detach()  # one step further
    assert [(a - x).abs().max().item() for a in [*seen[1:], last]] == pytest.approx(
        [0.04, 0.08, 0.1]
    )
    torch.testing.assert_close(free.perturbation, last - x)
    # It goes on at the next batch, and a shorter one takes a part of it and leaves the rest.
    other, kept = torch.rand_like(x[:4]), free.perturbation.clone()
    first = next(iter(free(other)))
    torch.testing.assert_close(first.detach(), (other + kept[:4]).clamp(0, 1))
    for adv in free(other):
        model(adv).sum().backward()
    assert torch.equal(free.perturbation[4:], kept[4:])
    assert not torch.equal(free.perturbation[:4], kept[:4])
    with pytest.raises(RuntimeError, match="a backward through the batch must have run"):
        list(free(x))


def test_trades():
    model, (x, y) = net(), batch()
    loss = trades_loss(model, x, y, beta=0.0)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(x), y))
    far = {"epsilon": 0.3, "step_size": 0.1, "beta": 6.0}
    robust = [trades_loss(model, x, y, **far, distance=d) for d in ("l_inf", "linf")]
    assert all(float(term.detach()) > float(loss.detach()) for term in robust)
    each = {
        name: torch.full((6,), far[name], device=DEVICE, requires_grad=True)
        for name in ("epsilon", "step_size")
    }
    torch.manual_seed(1)
    one = trades_loss(model, x, y, **far)
    torch.manual_seed(1)
    torch.testing.assert_close(trades_loss(model, x, y, **{**far, **each}), one)
    # No attack: the divergence is that of the start's noise alone.
    still = trades_loss(model, x, y, None, 0.0, 1e-9, 1, 6.0)
    torch.testing.assert_close(still, loss, rtol=0, atol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    torch.manual_seed(1)
    first = None
    for _ in range(40):
        loss = trades_loss(model, x, y, optimizer, **far, perturb_steps=3)
        first = first or loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first


def test_trades_in_float64():
    model, (x, y), found = net().double(), batch(), []
    loss = trades_loss(lambda x: found.append(model(x)) or found[-1], x.double(), y, beta=2.0)
    p, q = (logits.log_softmax(1) for logits in found[-2:])
    divergence = nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    expected = nn.functional.cross_entropy(found[-2], y) + 2 * divergence
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_trades_gives_both_sides_a_gradient():
    torch.manual_seed(2)
    weight = torch.randn(12, 3, device=DEVICE, requires_grad=True)
    x, y = torch.rand(4, 12, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    calls = []

    def model(x):
        calls.append(x)
        return x @ weight

    (found,) = torch.autograd.grad(trades_loss(model, x, y, beta=5.0), weight)
    p, q = ((v @ weight).log_softmax(1) for v in calls[-2:])
    expected = nn.functional.cross_entropy(x @ weight, y)
    expected = expected + 5 * nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0])
    assert len(calls) == 1 + 10 + 2


# Bad input


def refusals():
    model, lazy = nn.Linear(3, 2), nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    each = torch.full((4,), 0.1)
    of = functools.partial(dict, model=model, x_natural=x, y=y)
    for error, message, call in (
        (TypeError, "PGD: model must be a module or a function, got int", lambda: PGD(3)),
        (ValueError, "PGD: steps must be at least 1, got 0", lambda: PGD(model, steps=0)),
        (TypeError, "PGD: steps must be an integer, got float", lambda: PGD(model, steps=1.0)),
        (ValueError, "PGD: restarts must be at least 1, got 0", lambda: PGD(model, restarts=0)),
        (ValueError, "PGD: eps must be at least 0, got -1", lambda: PGD(model, -1)),
        (ValueError, "PGD: step_size must be at least 0", lambda: PGD(model, 1, -1)),
        (ValueError, "PGD: norm must be 'linf', 'l1' or 'l2'", lambda: PGD(model, norm="l0")),
        (ValueError, "PGD: lower must be at most upper", lambda: PGD(model, lower=1, upper=0)),
        (TypeError, "PGD: targeted must be True or False", lambda: PGD(model, targeted=1)),
        (TypeError, "PGD: loss must be a module or a function", lambda: PGD(model, loss="ce")),
        (ValueError, "FGSM: eps must be at least 0, got nan", lambda: FGSM(model, math.nan)),
        (ValueError, "PGD: step_size must be finite, got inf", lambda: PGD(model, 1, math.inf)),
        (ValueError, "backend must be one of .*, got 'gpu'", lambda: PGD(model, backend="gpu")),
        (TypeError, "FGSM: generator must be a torch.Gen", lambda: FGSM(model, generator=3)),
        (
            ValueError,
            "PGD: lower must be below inf",
            lambda: PGD(model, lower=math.inf, upper=None),
        ),
        (ValueError, "PGD: upper must be above -inf", lambda: PGD(model, upper=-math.inf)),
        (ValueError, "PGD: model must be .* got a lazy 0.weight", lambda: PGD(lazy)(x, y)),
        (ValueError, "trades_loss: model must be initialised", lambda: trades_loss(lazy, x, y)),
        (
            RuntimeError,
            "PGD: input must be a dense tensor, got sparse_coo",
            lambda: PGD(model)(x.to_sparse(), y),
        ),
        (TypeError, "PGD: input must be a Tensor, got list", lambda: PGD(model)([1], y)),
        (RuntimeError, "PGD: input must be one of float64", lambda: PGD(model)(x.byte(), y)),
        (ValueError, "PGD: target must be one for each of the 4", lambda: PGD(model)(x, y[:3])),
        (ValueError, "PGD: target must be one for each of", lambda: PGD(model)(x, y.sum())),
        (TypeError, "PGD: target must be a Tensor or a Mixed", lambda: PGD(model)(x, [0] * 4)),
        (TypeError, "PGD: model must be a function that returns logits", lambda: PGD(str)(x, y)),
        (
            RuntimeError,
            "PGD: model must be a function that returns logits",
            lambda: PGD(torch.sum)(x, y),
        ),
        (RuntimeError, "PGD: model must be such that", lambda: PGD(lambda x: x.detach())(x, y)),
        (IndexError, "target must be in|label", lambda: PGD(model)(x, y + 2)),
        (ValueError, "FreeAdversarial: replays must be at least", lambda: FreeAdversarial(1, 0)),
        (ValueError, "FreeAdversarial: eps must be at least 0", lambda: FreeAdversarial(-1)),
        (TypeError, "FreeAdversarial: eps must be a number, got", lambda: FreeAdversarial(each)),
        (
            TypeError,
            "FreeAdversarial: step_size must be a number, got a Tensor",
            lambda: FreeAdversarial(1, step_size=each),
        ),
        (ValueError, "backend must be one of", lambda: FreeAdversarial(backend="gpu")),
        *(
            (error, f"trades_loss: {message}", functools.partial(trades_loss, **arguments))
            for error, message, arguments in (
                (ValueError, "beta must be at least 0", of(beta=-1)),
                (ValueError, "y must be one for each of the 4", of(y=y[1:])),
                (RuntimeError, "x_natural must be a batch", of(x_natural=x.sum())),
                (ValueError, "distance must be 'linf', 'l1' or 'l2', got 'l3'", of(distance="l3")),
                (ValueError, "epsilon must be at least 0, got -1", of(epsilon=-1)),
            )
        ),
    ):
        yield pytest.param(error, message, call, id=message)


@pytest.mark.parametrize(("error", "message", "call"), [*refusals()])
def test_refusals(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_names():
    assert set(adversarial.__all__) == {"FGSM", "PGD", "FreeAdversarial", "trades_loss"}
