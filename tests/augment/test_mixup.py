"""Mixup: what it draws, how often, from which generator, and what it does to a batch."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch.utils.data import DataLoader, TensorDataset, default_collate

import reg_kernels.augment.mixup as module
from reg_kernels import functional as F
from reg_kernels.augment import MixedTarget, Mixup
from reg_kernels.augment.mixup import MODES

from support import DEVICE, DTYPE_IDS, DTYPES, implementations

on_each = pytest.mark.parametrize("backend", implementations())
modes = pytest.mark.parametrize("mode", MODES)
REFERENCE = {"backend": "reference", "num_classes": None}
# Every way through the drawing.
KINDS = [
    {},
    {"prob": 0.5},
    {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    {"cutmix_alpha": 1.0, "prob": 0.7},
    {"cutmix_minmax": (0.2, 0.8)},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def plain(samples, *shape, device=DEVICE, dtype=torch.float64):
    """A batch whose sample n holds the value n alone, and n as its label."""
    labels = torch.arange(samples, device=device)
    values = torch.arange(samples, dtype=dtype, device=device)
    return values.view(-1, *[1] * len(shape)).expand(samples, *shape).contiguous(), labels


def of_samples(lam, samples):
    return lam.expand(samples) if lam.dim() == 0 else lam


def changed(output, input):
    """Which pixels are the partner's, (N, H, W), in a batch of plain images that were cut."""
    partner = input.flip(0)
    assert ((output == input) | (output == partner)).all()
    return (output != input)[:, 0]


def box_of(mask):
    """(y1, y2, x1, x2) of what is True, (H, W), which has to be a full rectangle; zeros of none."""
    rows, columns = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return 0, 0, 0, 0
    y1, y2, x1, x2 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert mask[y1:y2, x1:x2].all() and mask.sum() == (y2 - y1) * (x2 - x1)
    return y1, y2, x1, x2


# What a call does to a batch


@on_each
@modes
@pytest.mark.parametrize("samples", [0, 1, 2, 5, 6])
def test_pixels_and_labels_are_mixed_alike(backend, mode, samples):
    x, labels = plain(samples, 3, 4, 5)
    kept = x.clone()
    mixed, target = Mixup(0.4, mode=mode, num_classes=6, backend=backend)(x, labels)
    assert isinstance(target, MixedTarget)
    assert x.equal(kept)
    assert target.labels.equal(labels)
    assert target.partner_labels.equal(labels.flip(0))
    assert target.label_smoothing == 0.1
    assert target.lam.dtype == torch.float32
    assert target.lam.shape == (() if mode == "batch" else (samples,))
    lam = of_samples(target.lam, samples).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.flip(0), rtol=1e-12, atol=1e-12)
    if samples == 6:
        assert len(target.lam.unique()) == {"batch": 1, "elem": 6, "pair": 3}[mode]
    if mode == "pair":
        assert target.lam.equal(target.lam.flip(0))


@on_each
@modes
@pytest.mark.parametrize("samples", [1, 2, 6, 7])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.6)])
def test_a_box_is_the_partners_and_lambda_the_share_of_the_rest(backend, mode, samples, minmax):
    x, labels = plain(samples, 2, 9, 8, dtype=torch.float32)
    mixup = Mixup(0.0, 1.0, minmax, mode=mode, num_classes=7, backend=backend)
    for _ in range(3):
        mixed, target = mixup(x, labels)
        masks = changed(mixed, x)
        for n, (mask, lam) in enumerate(zip(masks, of_samples(target.lam, samples), strict=True)):
            y1, y2, x1, x2 = box_of(mask)
            if 2 * n + 1 == samples:  # its own partner
                continue
            assert lam == torch.tensor(1 - (y2 - y1) * (x2 - x1) / 72)
            if minmax is not None:
                assert 1 <= y2 - y1 <= 5
                assert 1 <= x2 - x1 <= 4
        if mode != "elem":
            assert masks.equal(masks.flip(0))
        if mode == "batch" and samples % 2 == 0:
            assert (masks == masks[0]).all()


def test_gray_images_and_other_batches():
    x, labels = plain(4, 6, 6)
    mixed, target = Mixup(0.0, cutmix_alpha=1.0, mode="elem", **REFERENCE)(x, labels)
    masks = changed(mixed.unsqueeze(1), x.unsqueeze(1))
    assert target.lam.equal((1 - masks.double().mean((1, 2))).float())
    for shape in ((), (3,), (2, 3, 4, 5, 6)):
        x, labels = plain(4, *shape)
        mixed, target = Mixup(**REFERENCE)(x, labels)
        lam = target.lam.double()
        torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.flip(0))


def test_without_correction_lambda_is_what_was_drawn():
    x, labels = plain(2000, 1, 3, 3)
    shares = {}
    for correct in (False, True):
        mixup = Mixup(0.0, 1.0, mode="elem", correct_lam=correct, seed=0, **REFERENCE)
        mixed, target = mixup(x, labels)
        shares[correct] = target.lam, changed(mixed, x).float().mean((1, 2))
    (drawn, share), (corrected, same_share) = shares[False], shares[True]
    assert share.equal(same_share)
    torch.testing.assert_close(1 - corrected, share)
    assert drawn.unique().numel() == 2000
    assert (1 - drawn > share).double().mean() > 0.9  # clipped, and of sides rounded down


@on_each
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_bytes_are_normalised_in_the_same_pass(backend, layout, dtype):
    x = torch.randint(256, (6, 3, 5, 4), dtype=torch.uint8, device=DEVICE)
    x = x.to(memory_format=layout)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    options = {"mean": mean, "std": std, "dtype": dtype, "num_classes": None, "backend": backend}
    mixed, target = Mixup(mode="elem", **options)(x, torch.arange(6, device=DEVICE))
    assert mixed.dtype == (dtype or torch.float32)
    assert mixed.is_contiguous(memory_format=layout)
    lam = target.lam.double().view(-1, 1, 1, 1)
    values = (lam * x + (1 - lam) * x.flip(0)) / 255
    mean, std = (torch.tensor(each, device=DEVICE).view(3, 1, 1) for each in (mean, std))
    expected = ((values - mean) / std).to(mixed.dtype)
    tolerance = 1e-6 if dtype is None else 2e-3
    torch.testing.assert_close(mixed, expected, rtol=tolerance, atol=tolerance)


@on_each
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_in_place_is_the_same(backend, kind, dtype):
    x = torch.randn(5, 3, 6, 4, device=DEVICE, dtype=dtype)
    labels = torch.arange(5, device=DEVICE)
    options = {"mode": "elem", "seed": 3, "mean": 0.5, "std": 0.25, "backend": backend}
    expected, _ = Mixup(**kind, **options)(x, labels)
    mixed, _ = Mixup(**kind, **options, inplace=True)(x, labels)
    assert mixed is x
    assert mixed.equal(expected)


@on_each
@kinds
def test_gradients(backend, kind):
    x = torch.randn(3, 1, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    labels = torch.arange(3, device=DEVICE)

    def mixed(x, backend="reference"):
        return Mixup(**kind, mode="elem", seed=1, std=0.5, backend=backend)(x, labels)[0]

    assert torch.autograd.gradcheck(mixed, x)
    y = mixed(x, backend)
    grad_output = torch.randn_like(y)
    (expected,) = torch.autograd.grad(mixed(x), x, grad_output)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad_output)[0], expected)
    assert not Mixup(**REFERENCE)(x, labels)[1].lam.requires_grad


@on_each
def test_the_object_forces_its_backend(backend):
    x, labels = plain(2, 3)
    mixed, _ = Mixup(num_classes=None, backend=backend)(x.requires_grad_(), labels)
    suffix = "default" if backend == "native" else backend
    assert mixed.grad_fn.call[0] is getattr(torch.ops.reg_kernels.mixup, suffix)


# How often what is drawn


def lambdas(count, **options):
    x, labels = plain(count, dtype=torch.float32)
    return Mixup(mode="elem", **options, **REFERENCE)(x, labels)[1].lam.double().cpu()


def largest_distance(sample, cdf):
    """Kolmogorov and Smirnov's, but only where float32 still tells lambda from 0 and from 1."""
    at = np.concatenate(
        (np.logspace(-30, -1, 300), np.linspace(0.1, 0.9, 300), 1 - np.logspace(-1, -6, 100))
    )
    empirical = np.searchsorted(np.sort(sample), at, side="right") / len(sample)
    return np.abs(empirical - cdf(at)).max()


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.1, 0.4, 1.0, 3.0, 200.0])
def test_lambda_is_of_the_beta_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    count = 40_000
    lam = lambdas(count, mixup_alpha=alpha)
    assert ((lam >= 0) & (lam <= 1)).all()
    critical = 1.95 / count**0.5  # of 1 in 1000
    assert largest_distance(lam.numpy(), stats.beta(alpha, alpha).cdf) < critical


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_lambda_at_the_ends(alpha):
    lam = lambdas(1000, mixup_alpha=alpha)
    assert lam.unique().tolist() == ([0.0, 1.0] if alpha < 1 else [0.5])


def test_the_lambda_of_the_two_kinds_of_mixing_have_alphas_of_their_own():
    stats = pytest.importorskip("scipy.stats")
    count = 20_000
    x, labels = plain(count, 1, 2, 2)
    mixup = Mixup(0.1, 5.0, mode="elem", switch_prob=0.3, correct_lam=False, **REFERENCE)
    mixed, target = mixup(x, labels)
    # A cut pixel keeps its value exactly, a blended one is in between.
    whole = ((mixed == x) | (mixed == x.flip(0))).all((1, 2, 3)) & (target.lam > 0.02)
    whole &= target.lam < 0.98
    blended = ~((mixed == x) | (mixed == x.flip(0))).all((1, 2, 3))
    lam = target.lam.double().cpu().numpy()
    for sample, alpha in ((lam[whole.cpu()], 5.0), (lam[blended.cpu()], 0.1)):
        low, high = stats.beta(alpha, alpha).cdf([0.02, 0.98])
        inner = sample[(sample > 0.02) & (sample < 0.98)]
        result = stats.kstest(
            inner, lambda v, a=alpha, lo=low, hi=high: (stats.beta(a, a).cdf(v) - lo) / (hi - lo)
        )
        assert result.pvalue > 1e-3, alpha


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(
    "kind", [{}, {"cutmix_alpha": 1.0}, {"cutmix_minmax": (0.5, 0.5)}], ids=str
)
def test_prob(prob, kind):
    count = 4000
    x, labels = plain(count, 1, 4, 4)
    mixed, target = Mixup(prob=prob, mode="elem", **kind, **REFERENCE)(x, labels)
    same = (mixed == x).all((1, 2, 3))
    assert (target.lam[same] == 1).all()
    if kind != {"cutmix_alpha": 1.0}:  # there a box may have been clipped or rounded to nothing
        assert (
            abs((~same).double().mean().item() - prob)
            < 4 * (prob * (1 - prob) / count) ** 0.5 + 1e-9
        )
    elif prob == 0:
        assert same.all()


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_switch_prob(switch_prob, monkeypatch):
    seen = []
    blend = module.blend
    monkeypatch.setattr(
        module, "blend", lambda *args, **kw: (seen.append(args[3]), blend(*args, **kw))[1]
    )
    count = 4000
    x, labels = plain(count, 1, 8, 8)
    mixup = Mixup(cutmix_minmax=(0.5, 0.5), switch_prob=switch_prob, mode="elem", **REFERENCE)
    mixed, target = mixup(x, labels)
    cut = ((mixed == x) | (mixed == x.flip(0))).all((1, 2, 3)) & (target.lam < 1)
    spread = (switch_prob * (1 - switch_prob) / count) ** 0.5
    assert abs(cut.double().mean().item() - switch_prob) <= 4 * spread
    assert (target.lam[cut] == 0.75).all()
    assert (seen[0] is None) == (switch_prob == 0)


def timms_box(rng, height, width, lam):
    """As timm and the paper's code draw it."""
    ratio = np.sqrt(1 - lam)
    cut_h, cut_w = int(height * ratio), int(width * ratio)
    y, x = rng.integers(height), rng.integers(width)
    y1, y2 = np.clip([y - cut_h // 2, y + cut_h // 2], 0, height)
    x1, x2 = np.clip([x - cut_w // 2, x + cut_w // 2], 0, width)
    return y1, y2, x1, x2


def test_boxes_are_distributed_as_timms():
    stats = pytest.importorskip("scipy.stats")
    count, height, width = 20_000, 8, 11
    x, labels = plain(count, 1, height, width, dtype=torch.float32)
    mixed, _ = Mixup(0.0, 0.7, mode="elem", **REFERENCE)(x, labels)
    masks = changed(mixed, x).cpu().numpy()
    rng = np.random.default_rng(0)
    theirs = np.zeros_like(masks)
    for mask, lam in zip(theirs, rng.beta(0.7, 0.7, count), strict=True):
        y1, y2, x1, x2 = timms_box(rng, height, width, lam)
        mask[y1:y2, x1:x2] = True
    assert stats.ks_2samp(masks.sum((1, 2)), theirs.sum((1, 2))).pvalue > 1e-3
    for axis in (1, 2):
        assert stats.ks_2samp(masks.any(axis).sum(1), theirs.any(axis).sum(1)).pvalue > 1e-3
    # Every pixel is as often in a box as theirs.
    p = (masks.mean(0) + theirs.mean(0)) / 2
    assert (np.abs(masks.mean(0) - theirs.mean(0)) < 4 * (2 * p * (1 - p) / count) ** 0.5).all()


def test_minmax_boxes_have_every_length_and_place_alike():
    count, least, most = 30_000, 2, 5
    x, labels = plain(count, 1, 8, 10, dtype=torch.float32)
    mixed, _ = Mixup(cutmix_minmax=(0.25, 0.5), switch_prob=1.0, mode="elem", **REFERENCE)(
        x, labels
    )
    masks = changed(mixed, x).cpu().numpy()
    for axis, side, lengths in ((2, 8, range(2, 5)), (1, 10, range(least, most + 1))):
        hit = masks.any(axis)
        length, begin = hit.sum(1), hit.argmax(1)
        assert set(length) == set(lengths)
        for each in lengths:
            places = np.bincount(begin[length == each], minlength=side - each + 1)
            expected = count / len(lengths) / (side - each + 1)
            assert len(places) == side - each + 1
            assert (np.abs(places - expected) < 5 * expected**0.5).all()


def test_the_whole_image_may_be_the_box():
    x, labels = plain(4, 1, 3, 5)
    mixed, target = Mixup(cutmix_minmax=(1.0, 1.0), switch_prob=1.0, **REFERENCE)(x, labels)
    assert mixed.equal(x.flip(0))
    assert target.lam == 0


def test_enabled_as_timms():
    mixup = Mixup(cutmix_alpha=1.0, mode="elem", mean=1.0, **REFERENCE)
    mixup.mixup_enabled = False
    x, labels = plain(4, 1, 3, 5)
    state = torch.get_rng_state()
    mixed, target = mixup(x, labels)
    assert mixed.equal(x - 1)
    assert (target.lam == 1).all()
    assert torch.get_rng_state().equal(state)


# Generators


@modes
@kinds
def test_two_objects_of_one_seed_draw_the_same(mode, kind):
    x, labels = plain(6, 3, 8, 8)
    first, second, other = (Mixup(**kind, mode=mode, seed=s, **REFERENCE) for s in (5, 5, 6))
    before = torch.get_rng_state()
    draws = [[each(x, labels) for _ in range(12)] for each in (first, second, other)]
    assert torch.get_rng_state().equal(before)  # torch's own moved nowhere
    for (a, target), (b, its_twin) in zip(draws[0], draws[1], strict=True):
        assert a.equal(b)
        assert target.lam.equal(its_twin.lam)
    assert not all(a.equal(b) for (a, _), (b, _) in zip(draws[0], draws[2], strict=True))
    assert not all(draws[0][0][0].equal(a) for a, _ in draws[0][1:])


@modes
@kinds
def test_torchs_seed_rules(mode, kind):
    x, labels = plain(6, 3, 8, 8)
    mixup = Mixup(**kind, mode=mode, **REFERENCE)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([mixup(x, labels)[0] for _ in range(12)])
    assert all(a.equal(b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not all(a.equal(b) for a, b in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_where_the_original_is(copier):
    mixup = Mixup(0.3, mode="elem", seed=-7, mean=(0.5,), std=torch.tensor([2.0]), **REFERENCE)
    x, labels = plain(6, 1)
    x, labels = x.cpu(), labels.cpu()
    mixup(x, labels)
    twin = copier(mixup)
    assert repr(twin) == repr(mixup)
    for _ in range(3):
        assert twin(x, labels)[0].equal(mixup(x, labels)[0])


# Where it may run


@modes
@kinds
def test_no_value_is_looked_at(mode, kind):
    """Which would wait for a GPU: a meta tensor has none, and raises where one is asked for."""
    mixup = Mixup(**kind, mode=mode, backend="reference", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    x = torch.empty(5, 3, 8, 6, dtype=torch.uint8, device="meta")
    labels = torch.empty(5, dtype=torch.int64, device="meta")
    mixed, target = mixup(x, labels)
    assert mixed.device == target.lam.device == x.device
    assert (mixed.dtype, mixed.shape) == (torch.float32, (5, 3, 8, 6))
    assert target.lam.shape == (() if mode == "batch" else (5,))


@pytest.mark.skipif(DEVICE == "cpu", reason="watches a GPU")
@kinds
@pytest.mark.parametrize("seed", [None, 1])
def test_nothing_waits_for_the_gpu(kind, seed):
    mixup = Mixup(**kind, mode="elem", seed=seed, mean=0.5, std=0.25)
    x, labels = plain(6, 3, 8, 8, dtype=torch.float32)
    mixup(x, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixup(x, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each
@pytest.mark.parametrize(
    ("mode", "kind"), [("batch", KINDS[0]), ("elem", KINDS[3]), ("pair", KINDS[4])], ids=str
)
def test_compiled_whole_it_draws_the_same(backend, mode, kind):
    torch.compiler.reset()
    options = {"num_classes": 10, "mean": (0.1, 0.2, 0.3), "backend": backend}
    mixup = Mixup(**kind, mode=mode, **options)
    compiled = torch.compile(lambda *a: mixup(*a), fullgraph=True, backend="aot_eager")
    for samples, height in ((4, 6), (7, 5), (10, 3)):
        x, labels = plain(samples, 3, height, 8, dtype=torch.float32)
        torch.manual_seed(samples)
        mixed, target = compiled(x, labels)
        torch.manual_seed(samples)
        expected, its_target = mixup(x, labels)
        assert mixed.equal(expected)
        assert isinstance(target, MixedTarget)
        assert target.lam.equal(its_target.lam)
        assert target.partner_labels.equal(its_target.partner_labels)


def collate(mixup, batch):
    return mixup(*default_collate(batch))


def epoch(mixup, torchs_seed, workers=2, epochs=1):
    """The batches of some epochs of a loader, in the order that they come in."""
    x, labels = plain(24, 1, 4, 4, device="cpu")
    torch.manual_seed(torchs_seed)
    data = TensorDataset(x, labels)
    collate_fn = functools.partial(collate, mixup)
    loader = DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate_fn)
    return [batch for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("seed", [None, 3])
def test_in_a_loaders_workers(seed):
    mixup = Mixup(cutmix_alpha=1.0, mode="elem", seed=seed, **REFERENCE)
    batches = epoch(mixup, torchs_seed=1, epochs=2)
    assert len(batches) == 12
    for n, (mixed, target) in enumerate(batches):
        assert isinstance(target, MixedTarget)
        first = 4 * (n % 6)
        assert target.labels.tolist() == list(range(first, first + 4))
        assert target.partner_labels.equal(target.labels.flip(0))
        assert mixed.shape == (4, 1, 4, 4)
    lam = torch.stack([target.lam for _, target in batches])
    # Each worker, and each epoch's, draws its own.
    assert all(not lam[i].equal(lam[j]) for i in range(12) for j in range(i))
    again = epoch(mixup, torchs_seed=1, epochs=2)
    assert all(a.equal(b) for (a, _), (b, _) in zip(batches, again, strict=True))


def test_seeds_tell_apart_the_same_workers():
    first, other = (
        epoch(Mixup(mode="elem", seed=seed, **REFERENCE), torchs_seed=1) for seed in (1, 2)
    )
    assert not any(a.equal(b) for (a, _), (b, _) in zip(first, other, strict=True))


# Arguments


def test_repr_and_attributes_are_timms():
    mixup = Mixup(0.2, 1.0, None, 0.9, 0.4, "pair", False, 0.05, 10, seed=4, dtype=torch.float16)
    assert repr(mixup) == (
        "Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, cutmix_minmax=None, prob=0.9, switch_prob=0.4, "
        "mode='pair', correct_lam=False, label_smoothing=0.05, num_classes=10, seed=4, mean=None, "
        "std=None, dtype=torch.float16, inplace=False, dense=False, backend=None)"
    )
    assert (mixup.mix_prob, mixup.mixup_enabled) == (0.9, True)
    assert Mixup(cutmix_minmax=[0.2, 0.3]).cutmix_minmax == (0.2, 0.3)
    assert Mixup(0.0, cutmix_minmax=(0.2, 0.3)).cutmix_alpha == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha must be finite and not negative, got -0.1"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha must be finite and not negative, got inf"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha must be finite and not negative, got nan"),
        (
            {"mixup_alpha": 0},
            "mixup_alpha or cutmix_alpha must be positive, or cutmix_minmax given",
        ),
        ({"prob": 1.1}, r"prob must be in \[0, 1\], got 1.1"),
        ({"switch_prob": -1}, r"switch_prob must be in \[0, 1\], got -1"),
        ({"label_smoothing": 2.0}, r"label_smoothing must be in \[0, 1\], got 2.0"),
        ({"mode": "half"}, "mode must be one of batch, elem, pair, got 'half'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"cutmix_minmax": (0.5, 0.2)}, r"0 <= least <= most <= 1, got \(0.5, 0.2\)"),
        ({"cutmix_minmax": (0.5, 1.2)}, r"0 <= least <= most <= 1, got \(0.5, 1.2\)"),
        ({"cutmix_minmax": (0.5,)}, r"two shares of a side.* got \(0.5,\)"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mixup(**options)


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_a_dense_target(mode):
    """timm's losses take no other; the draws are the same."""
    x, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 2])
    options = {"mode": mode, "num_classes": 4, "label_smoothing": 0.2, "seed": 3}
    mixed, target = Mixup(0.8, 1.0, **options)(x, labels)
    again, dense = Mixup(0.8, 1.0, dense=True, **options)(x, labels)
    assert torch.equal(mixed, again)
    lam = target.lam.double().view(-1, 1)
    one, other = (TF.one_hot(each, 4) * 0.8 + 0.05 for each in (labels, labels.flip(0)))
    assert (dense.shape, dense.dtype) == ((5, 4), torch.float32)
    torch.testing.assert_close(dense, (lam * one + (1 - lam) * other).float())
    logits = torch.randn(5, 4)
    loss = (-dense * logits.log_softmax(1)).sum(1).mean()  # SoftTargetCrossEntropy
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    with pytest.raises(ValueError, match=r"^Mixup: num_classes must be given for a dense target$"):
        Mixup(dense=True, num_classes=None)


@pytest.mark.parametrize("inplace", [False, True])
def test_under_a_default_device(inplace):
    x, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    mixup = Mixup(1.0, 1.0, num_classes=4, seed=1, mean=0.3, std=(0.5,) * 3, inplace=inplace)
    expected, target = copy.deepcopy(mixup)(x.clone(), labels)
    with torch.device("meta"):
        mixed, other = mixup(x.clone(), labels)
        index = torch.tensor([1, 0, 3, 2], device="cpu")
        assert F.mixup(x.clone(), 0.3, index, inplace=inplace).device.type == "cpu"
    assert torch.equal(mixed, expected)
    assert torch.equal(other.lam, target.lam)


def test_a_seed_is_an_int():
    with pytest.raises(TypeError, match=r"^Mixup: seed must be an integer, got float$"):
        Mixup(seed=1.0)


@pytest.mark.parametrize(
    ("input", "target", "error", "message"),
    [
        ([1.0], torch.zeros(1), TypeError, "input must be a Tensor, got list"),
        (torch.ones(2, 3), [0, 1], TypeError, "target must be a Tensor, got list"),
        (torch.ones(()), torch.zeros(1), ValueError, r"input must be a batch \(N, ...\), got 0"),
        (torch.ones(2, 3), torch.zeros(2), RuntimeError, "int64 class indices, got float32"),
        (
            torch.ones(2, 3),
            torch.zeros(2, dtype=torch.int32),
            RuntimeError,
            "int64 class indices, got int32",
        ),
        (
            torch.ones(2, 3),
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"target must be \(2,\), a label for each sample, got shape \(3,\)",
        ),
        (
            torch.ones(2, 3),
            torch.zeros(2, 3, dtype=torch.int64),
            ValueError,
            r"target must be \(2,\), a label for each sample, got shape \(2, 3\)",
        ),
        (
            torch.ones(2, 3),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            RuntimeError,
            "target must be on the input's device, cpu, got meta",
        ),
        (torch.ones(2, 3), torch.tensor([0, 5]), IndexError, r"labels must be in \[0, 5\), got 5"),
        (torch.ones(2, 3), torch.tensor([-100, 3]), IndexError, r"\[0, 5\), got -100"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            torch.tensor([0, 1]),
            RuntimeError,
            "input must be one of float64, float32, float16, bfloat16 or uint8, got int64",
        ),
    ],
)
def test_bad_calls(input, target, error, message):
    with pytest.raises(error, match=f"^Mixup: .*{message}"):
        Mixup(num_classes=5, backend="reference")(input, target)


def test_what_can_be_cut_are_images():
    x, labels = plain(2, 3)
    with pytest.raises(ValueError, match=r"^Mixup: input must be images .*, got 2 dimensions"):
        Mixup(cutmix_alpha=1.0, **REFERENCE)(x, labels)
    Mixup(cutmix_alpha=1.0, switch_prob=0.0, **REFERENCE)(x, labels)
    with pytest.raises(RuntimeError, match=r"^Mixup: inplace needs an output of the input's dtype"):
        Mixup(dtype=torch.float16, inplace=True, **REFERENCE)(x, labels)
    labels[0] = -100  # an ignored one, where no classes are told
    Mixup(**REFERENCE)(x, labels)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_gray_images_have_one_channel_whether_they_are_cut_or_not(enabled, inplace):
    mixup = Mixup(1.0, 1.0, mean=0.5, std=(0.25,), inplace=inplace)
    mixup.mixup_enabled = enabled
    images = torch.rand(4, 6, 7)
    expected = (images - 0.5) / 0.25
    mixed, _ = mixup(images, torch.zeros(4, dtype=torch.int64))
    assert mixed.shape == expected.shape
    assert (mixed is images) == inplace
    if not enabled:
        torch.testing.assert_close(mixed, expected)
