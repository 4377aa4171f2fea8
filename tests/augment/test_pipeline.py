"""A pipeline: what its draws depend on, what it takes and returns, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from reg_kernels import augment
from reg_kernels.augment import _draws
from reg_kernels.ops import _host_draws
from reg_kernels.reference._philox import philox4x32

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STEPS = (
    augment.RandomResizedCrop(12),
    augment.RandomHorizontalFlip(),
    augment.RandAugment(2, 9),
    augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    augment.GaussianNoise(sigma=0.05),
    augment.Normalize(MEAN, STD),
    augment.RandomErasing(0.5, value="random"),
)


def images(samples=6, height=16, width=20):
    seeded = torch.Generator().manual_seed(samples)
    size = (samples, 3, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=seeded)


def pipeline(*steps, **options):
    return augment.Pipeline(*(steps or STEPS), **{"seed": 7, "layout": "NCHW"} | options)


def drawn(made, *args, **options):
    """The parameters of a call, by name."""
    params = made(*args, return_params=True, **options)[-1]
    return {column: params[column] for column in params.columns}


# Draws


@pytest.mark.parametrize("epoch", [9, 2**32 - 5])
def test_words_are_philoxs(epoch, monkeypatch):
    indices = torch.tensor([0, 5, 2**33 + 7])
    groups = torch.tensor([3 << 8 | 1, 0xFFFFFF << 8 | 7])
    for seed in (-77, 2**62 + 5):
        key = (seed ^ _draws.TAG) % 2**64
        key = torch.tensor(key - 2**64 if key >= 2**63 else key)
        words = torch.stack([
            word.double() / 2**32
            for group in groups
            for word in philox4x32(key, indices, (torch.full_like(indices, epoch) << 32) + group)
        ])  # fmt: skip
        assert torch.equal(_draws.uniform(seed, epoch, indices, groups), words)
        with monkeypatch.context() as without:
            without.setattr(_host_draws, "_C", None)
            assert torch.equal(_draws.uniform(seed, epoch, indices, groups), words)


def test_rectangles_are_the_references(monkeypatch):
    crop = augment.RandomResizedCrop(12, scale=(0.001, 0.9), ratio=(0.2, 3))
    narrow = augment.RandomResizedCrop(12, scale=(0.9, 1.0), ratio=(4, 5))  # at times none fits
    erase = augment.RandomErasing(1.0, scale=(0.0, 1.0), ratio=(0.02, 30))
    made = pipeline(narrow, crop, erase)
    batch = [images(1, 9 + n % 7, 4 + n)[0] for n in range(64)]
    rows = made(batch, return_params=True, indices=range(64))[1].table
    monkeypatch.setattr(_host_draws, "_C", None)
    assert torch.equal(made(batch, return_params=True, indices=range(64))[1].table, rows)
    assert 0 < (rows[:, -2] == 0).sum() < 64  # of some images nothing is erased


def test_gammas_have_their_moments():
    u = _draws.uniform(3, 0, torch.arange(20000), torch.arange(7))
    for alpha in (0.2, 1.0, 3.0):
        gammas = _draws.log_gammas(alpha, u[: _draws.GAMMA_WORDS]).exp()
        assert abs(gammas.mean() / alpha - 1) < 0.05 and abs(gammas.var() / alpha - 1) < 0.12
    z = _draws.normals(u[0], u[1])
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.02


def test_a_sample_is_the_same_in_any_batch():
    made, batch = pipeline(), images()
    whole, target = made(batch, torch.arange(6), indices=range(10, 16))
    assert torch.equal(target, torch.arange(6))
    shuffled = torch.tensor([3, 0, 5])
    part = made(batch[shuffled], indices=shuffled + 10)
    assert torch.equal(part, whole[shuffled])
    halves = [pipeline()(batch[half], indices=torch.arange(6)[half] + 10) for half in
              (slice(0, 3), slice(3, 6))]  # fmt: skip
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(made(batch, indices=range(6)), whole)
    assert not torch.equal(pipeline(seed=8)(batch, indices=range(10, 16)), whole)


def test_epochs_and_resuming():
    made, batch = pipeline(), images()
    first, second = made(batch), made(batch)
    state = made.state_dict()
    third = made(batch)
    assert not torch.equal(first, second) and state["position"] == 12
    other = pipeline(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other(batch), third)
    made.set_epoch(1)
    assert not torch.equal(made(batch), first)
    made.set_epoch(0)
    assert torch.equal(made(batch), first)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(batch), second)


def test_leaving_a_transform_out_shifts_no_other():
    batch = images() / 255  # what is erased with random values has to be floats
    every = drawn(pipeline(), batch)
    for left_out in range(1, len(STEPS)):
        steps = [*STEPS[:left_out], *STEPS[left_out + 1 :]]
        for column, values in drawn(pipeline(*steps), batch).items():
            assert torch.equal(values, every[column]), column
    twice = drawn(pipeline(augment.RandomVerticalFlip(), *STEPS, augment.RandomErasing()), batch)
    assert {name: twice[name] for name in every}.keys() == every.keys()
    assert all(torch.equal(twice[name], values) for name, values in every.items())
    assert not torch.equal(twice["RandomErasing.top"], twice["RandomErasing2.top"])


def test_p_is_how_often_and_one_batch_may_share_its_draws():
    made = pipeline(augment.RandomHorizontalFlip(0.3))
    applied = drawn(made, torch.zeros(4000, 1, 2, 2))["RandomHorizontalFlip.applied"]
    assert abs(applied.mean() - 0.3) < 0.03
    same = drawn(pipeline(same_on_batch=True), images())
    assert all((values == values[0]).all() for values in same.values())
    clip = pipeline(same_on_batch=True)(images(1).expand(4, -1, -1, -1))
    assert torch.equal(clip, clip[:1].expand_as(clip))


def test_mixup_draws_by_samples_too():
    mixup = augment.Mixup(0.2, cutmix_alpha=1.0, mode="elem", num_classes=10)
    made, batch, labels = pipeline(*STEPS, mixup), images(), torch.arange(6)
    mixed, target = made(batch, labels, indices=range(6))
    again, same = made(batch, labels, indices=range(6))
    assert torch.equal(mixed, again) and torch.equal(target.lam, same.lam)
    pair, lam = (x[:2] for x in (mixed, target.lam))
    assert len(set(target.lam.tolist())) > 3 and len(pair) == len(lam)
    # The batch of the others' draws: the first and the last sample, who are each other's partners.
    ends = made(batch[[0, 5]], labels[[0, 5]], indices=[0, 5])
    assert torch.equal(ends[0], mixed[[0, 5]]) and torch.equal(ends[1].lam, target.lam[[0, 5]])
    plain, kept = made.eval()(batch, labels)
    assert torch.equal(plain, pipeline(*STEPS).eval()(batch)) and kept is labels
    with pytest.raises(ValueError, match="Pipeline: target must be given where Mixup"):
        made.train()(batch)


# What it takes and returns


def test_layouts_are_the_same_image():
    batch = images()
    last = batch.permute(0, 2, 3, 1).contiguous()
    expected = pipeline()(batch)
    for given, layout in (
        *((batch, "NCHW"), (batch, None), (last, "NHWC"), (last, None)),
        (batch.contiguous(memory_format=torch.channels_last), "NCHW"),
        (last.permute(0, 3, 1, 2), None),
        (batch.repeat(1, 1, 1, 2)[:, :, :, :20], None),
        (batch.repeat_interleave(2, 0)[::2], "NCHW"),
        ([*batch], None),
        ([*last], "NHWC"),
    ):
        assert torch.equal(pipeline(layout=layout)(given), expected)
    kept = pipeline()(batch.contiguous(memory_format=torch.channels_last))
    assert kept.is_contiguous(memory_format=torch.channels_last)
    asked = pipeline(memory_format=torch.channels_last, dtype=torch.float16)(batch)
    assert asked.is_contiguous(memory_format=torch.channels_last) and asked.dtype == torch.float16


def test_torchs_defaults_count_for_nothing():
    steps = (*STEPS[:5], augment.AugMix(), augment.RandomPerspective(), augment.GaussianBlur(3))
    expected = pipeline(*steps)(images())
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(pipeline(*steps)(images()), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    batch, elsewhere = images(), pipeline(*steps)
    with torch.device("meta"):
        made = elsewhere(batch)
    assert torch.equal(made, expected)


def test_compiled_code_calls_it_as_it_is():
    made, batch = pipeline(), images(2)

    def loss(batch):
        return made(batch, indices=[3, 4]) + 1

    compiled = torch.compile(loss, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(batch), loss(batch))


def test_images_of_different_sizes():
    sizes = [(16, 20), (9, 31), (40, 12), (1, 1)]
    batch = [images(1, *size)[0] for size in sizes]
    together = pipeline()(batch)
    for number, image in enumerate(batch):
        alone = pipeline()([image], indices=[number])
        assert torch.equal(alone[0], together[number])


def test_dtypes_and_ranges():
    batch = images()
    crop = augment.RandomCrop((16, 20))
    assert torch.equal(pipeline(crop)(batch), batch)
    scaled = pipeline(crop, dtype=torch.float32)(batch)
    torch.testing.assert_close(scaled, batch.float() / 255)
    assert torch.equal(pipeline(crop, dtype=torch.uint8)(scaled), batch)
    noted = pipeline(augment.ToDtype(torch.float16), augment.RandomErasing(1.0, value=0.5))(
        0 * batch
    )
    assert noted.dtype == torch.float16 and noted.max() == 0.5
    normalized = pipeline(augment.Normalize(MEAN, STD))(batch)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(normalized, (batch / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    gray = pipeline(augment.Grayscale(), augment.Normalize(0.5, 0.5))(batch)
    luma = (batch / 255 * torch.tensor((0.2989, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(gray, (luma - 0.5) / 0.5, atol=1e-5, rtol=1e-5)


def test_evaluation_is_deterministic():
    made = pipeline().eval()
    batch = images(3, 40, 30)
    result, params = made(batch, return_params=True)
    assert torch.equal(made(batch), result) and made.state_dict()["position"] == 0
    assert params.columns == ("index", "epoch", "height", "width")
    steps = (augment.Resize(14), augment.CenterCrop(12), augment.Normalize(MEAN, STD))
    assert torch.equal(pipeline(*steps)(batch), result)


def test_gradients_go_to_floats():
    x = (images(1, 4, 5) / 255).double().requires_grad_()
    steps = (augment.RandomAffine(20, interpolation="bilinear"), augment.Normalize(MEAN, STD))
    made = pipeline(*steps, backend="reference")
    assert torch.autograd.gradcheck(lambda x: made(x, indices=[4]), (x,), fast_mode=True)


def test_torch_func_looks_at_the_images_alone():
    mixup = augment.Mixup(0.4, cutmix_alpha=1.0, num_classes=3)
    steps = (augment.RandomResizedCrop((7, 13)), *STEPS[1:4], STEPS[-1], mixup)
    made, x = pipeline(*steps, layout=None), images(3, 11, 17) / 255

    def loss(x):
        mixed, _, params = made(x, torch.arange(3), indices=torch.arange(3), return_params=True)
        assert made.apply(x, params).shape == mixed.shape
        return mixed.square().sum()

    gradient = torch.func.grad(loss)(x)  # first, so that what is kept of a call is kept in there
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(leaf.grad, gradient)
    torch.testing.assert_close(torch.func.grad(loss)([*x]), [*gradient])


class Pictures(Dataset):
    """Bytes (H, W, C) of different sizes, a label and the index of each."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return images(1, 8 + index, 20 - index)[0].permute(1, 2, 0), index % 3, index


def test_workers_and_order_of_a_loader_count_for_nothing():
    def lists(samples):
        pictures, labels, indices = zip(*samples, strict=True)
        return [*pictures], torch.tensor(labels), torch.tensor(indices)

    made, results = pipeline(layout=None), []
    for options in ({"batch_size": 4}, {"batch_size": 3, "shuffle": True}):
        result = torch.empty(10, 3, 12, 12)
        for batch, labels, indices in DataLoader(Pictures(), collate_fn=lists, **options):
            result[indices], kept = made(batch, labels, indices=indices)
            assert kept is labels
        results.append(result)
    assert torch.equal(*results)


# Replay


def test_parameters_are_saved_and_are_of_one_pipeline():
    made, batch = pipeline(), images()
    _, params = made(batch, return_params=True)
    saved = io.BytesIO()
    torch.save(params, saved)
    saved.seek(0)
    loaded = torch.load(saved)
    masks = torch.randint(0, 9, (6, 16, 20))
    mask = made.apply(masks, params)
    assert torch.equal(pipeline(seed=0).apply(masks, loaded), mask) and mask.shape == (6, 12, 12)
    assert torch.equal(made.apply([*masks], params), mask)
    assert torch.equal(made.apply(masks.unsqueeze(1).byte(), params)[:, 0].long(), mask)
    assert params["RandomResizedCrop.top"].dtype == torch.float64
    with pytest.raises(KeyError, match="column must be one of index, epoch"):
        params["angle"]
    for other in (pipeline(augment.RandomResizedCrop(12)), pipeline(fuse_geometry=False)):
        with pytest.raises(ValueError, match=r"Pipeline: params must be of this .*size=\(12"):
            other.apply(masks, params)


@pytest.mark.parametrize("exact", [None, "torchvision"])
def test_a_mask_that_is_the_image(exact):
    warps = augment.RandomRotation(40), augment.RandomPerspective(0.5, 1.0, "nearest")
    for steps in (warps, (augment.RandomHorizontalFlip(), warps[0], augment.RandomCrop(9))):
        made = pipeline(*steps, exact=exact)
        result, params = made(images(), return_params=True)
        # Of a matrix of float32 another pixel may be the nearest.
        assert (made.apply(images(), params) != result).double().mean() <= (0.003 if exact else 0)


@pytest.mark.parametrize("name", ["bool", "int8", "uint16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("most", [2**63 - 1, 100])
def test_masks_keep_every_whole_number(name, most):
    dtype, warp = getattr(torch, name), augment.RandomAffine(20, (0.3, 0.3))
    made = pipeline(warp, augment.RandomCrop(14, 2, padding_mode="reflect"))
    labels = images(4, 16, 20)
    _, params = made(labels, return_params=True)
    seeded = torch.Generator().manual_seed(1)
    values = torch.randint(-most - 1, most, (256,), generator=seeded).to(dtype)
    values[255] = 1
    values = values.view(torch.uint8).view(256, -1)  # since torch looks up no unsigned ones
    expected = values[made.apply(labels, params, fill=255).long()]
    masks = values[labels.long()].view(dtype).squeeze(-1)
    for given in (masks, [*masks], masks.contiguous(memory_format=torch.channels_last)):
        moved = made.apply(given, params, fill=1)
        assert moved.dtype == dtype and torch.equal(moved.unsqueeze(-1).view(torch.uint8), expected)
    flat = made.apply([mask[0] for mask in masks], params, fill=1)
    assert torch.equal(flat.unsqueeze(-1).view(torch.uint8), expected[:, 0])


def test_masks_go_with_mixed_images():
    flip, batch, labels = augment.RandomHorizontalFlip(), images() / 255, torch.arange(6)
    both = augment.RandomChoice([augment.CutMix(mode="elem"), augment.MixUp(mode="elem")])
    for mixup in (augment.CutMix(mode="pair"), augment.MixUp(mode="elem"), augment.MixUp(), both):
        made = pipeline(flip, mixup)
        result, target, params = made(batch, labels, return_params=True)
        torch.testing.assert_close(made.apply(batch, params), result)
        partner = params["Mixup.partner"].long()
        assert torch.equal(target.partner_labels, partner)
        assert torch.equal(target.lam.double().expand(6), params["Mixup.label_lam"])
        plain = pipeline(flip)(batch)
        outside = params["Mixup.lam"].view(-1, 1, 1, 1).float()
        blended = outside * plain + (1 - outside) * plain[partner]
        for image, own, other, row in zip(
            result, blended, plain[partner], params.table, strict=True
        ):
            x1, y1, x2, y2 = row[-5:-1].long().tolist()
            own[:, y1:y2, x1:x2] = other[:, y1:y2, x1:x2]
            torch.testing.assert_close(image, own)
        points = torch.zeros(6, 1, 2)
        with pytest.raises(ValueError, match="images that were not mixed, since keypoints do not"):
            made.keypoints(points, params)
        masks = (batch[:, 0] * 9).long()
        if (params["Mixup.lam"] != 1).any():
            with pytest.raises(
                ValueError, match=r"masks must be of floats where Mixup .* got int64"
            ):
                made.apply(masks, params)
        else:
            assert torch.equal(made.apply(masks, params), made.apply(masks.double(), params).long())
        mixup.mixup_enabled = False
        *_, params = made(batch, labels, return_params=True)
        assert made.keypoints(points, params).shape == (6, 1, 2)
        assert torch.equal(made.apply(masks, params), pipeline(flip).apply(masks, drop(params)))


def drop(params):
    """Parameters of the same without a Mixup."""
    kept = [name for name in params.columns if not name.startswith("Mixup")]
    return augment.Params(params.table[:, : len(kept)], tuple(kept), params.pipeline)


def test_masks_go_with_images_of_floats_that_are_erased():
    made = pipeline(augment.RandomErasing(1.0, value="random"))
    _, params = made(images() / 255, return_params=True)
    masks = torch.randint(0, 9, (6, 16, 20))
    assert torch.equal(made.apply(masks, params), masks)


def test_a_mask_goes_with_its_image():
    made, batch = pipeline(*STEPS[:2], augment.RandAugment(2, 20)), images()
    labels = (batch[:, :1] > 128).byte() + 1
    # Geometry alone, by the nearest pixel, on what has no colours to change.
    crop = augment.RandomResizedCrop(12, interpolation="nearest-exact")
    plain = pipeline(crop, STEPS[1], dtype=torch.uint8)
    expected, params = plain(labels, return_params=True)
    assert torch.equal(plain.apply(labels, params), expected)
    _, params = made(batch, return_params=True)
    assert set(made.apply(labels, params, fill=7).unique().tolist()) <= {1, 2, 7}


# What it refuses


CALLS = {
    "images must be .N, C, H, W., .* got 3 dimensions": ((), torch.zeros(3, 8, 8)),
    "images must be uint8 or one of .* got int64": ((), torch.zeros(1, 3, 8, 8).long()),
    "images must be dense, got sparse_coo": ((), torch.zeros(1, 3, 8, 8).to_sparse()),
    "images must be a batch of one image at least, got an empty": ((), torch.zeros(0, 3, 8, 8)),
    "images must be all of as many channels, got 1, 3": (
        *((), [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)]),
    ),
    "images must be images of 1 to 4 channels, got one of .5, 8, 8.": ((), torch.zeros(1, 5, 8, 8)),
    "ColorJitter: images must be of 1 or 3 channels, got 4": (
        *((augment.ColorJitter(0.1),), torch.zeros(1, 4, 8, 8)),
    ),
    "RandomCrop: size must be no larger than the padded image, got .9, 9. for a side of 8": (
        *((augment.RandomCrop(9),), torch.zeros(1, 3, 8, 8)),
    ),
    "RandomCrop: padding must be less than .* 'reflect', got 8 for a side of 8": (
        *((augment.RandomCrop(8, 8, padding_mode="reflect"),), torch.zeros(1, 3, 8, 8)),
    ),
    "GaussianBlur: kernel_size must be at most .* got 3 for a side of 1": (
        *((augment.GaussianBlur(3),), torch.zeros(1, 3, 1, 1)),
    ),
    "RandomAffine: fill must be one number, or one for each of the image's 3 .* got 2": (
        *((augment.RandomAffine(9, fill=(1, 2)),), torch.zeros(1, 3, 8, 8)),
    ),
    "RandomSolarize: threshold must be at most 1, the largest value, got 128": (
        *((augment.RandomSolarize(128),), torch.zeros(1, 3, 8, 8)),
    ),
    "transforms must be such that all images end at one size, .* got .8, 8. and .9, 8.": (
        *((), [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)]),
    ),
    "RandomRotation: fill must be the same for the last two of four channels, got .1.0, 2.0, 3": (
        *((augment.RandomRotation(9, fill=(1, 2, 3, 4)),), torch.zeros(1, 4, 8, 8)),
    ),
    "Pad: padding must be at most an image's side with .* 'symmetric', got 9 for a side of 8": (
        *((augment.Pad(9, padding_mode="symmetric"),), torch.zeros(1, 3, 8, 8)),
    ),
    "RandomErasing: value must be numbers where it erases bytes, got 'channel'": (
        *((augment.RandomErasing(1.0, value="channel"),), images(1)),
    ),
    "ThreeAugment: images must be larger than 7 pixels": (
        *((augment.ThreeAugment(),), torch.zeros(1, 3, 7, 9)),
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_are_refused(message):
    steps, batch = CALLS[message]
    with pytest.raises((ValueError, RuntimeError), match=message):
        augment.Pipeline(*steps, layout="NCHW")(batch)


A = augment
ARGUMENTS = {
    "RandomHorizontalFlip: p must be in .0, 1., got 1.5": lambda: A.RandomHorizontalFlip(1.5),
    r"RandomResizedCrop: scale must be \(low, high\) with low <= high": (
        lambda: A.RandomResizedCrop(8, scale=(1.0, 0.5))
    ),
    "RandomResizedCrop: ratio must be": lambda: A.RandomResizedCrop(8, ratio=(0.0, 1.0)),
    "RandomResizedCrop: size must be from 1": lambda: A.RandomResizedCrop(0),
    "RandomResizedCrop: interpolation must be one of nearest,": (
        lambda: A.RandomResizedCrop(8, interpolation="lanczos")
    ),
    "RandomCrop: padding_mode must be one of constant": (
        lambda: A.RandomCrop(8, padding_mode="wrap")
    ),
    "Resize: max_size must be given": lambda: A.Resize(None),
    "RandomRotation: degrees must be at least 0": lambda: A.RandomRotation(-3),
    "RandomAffine: translate must be in .0, 1., got 2": lambda: A.RandomAffine(1, (2, 0)),
    "RandomPerspective: distortion_scale must be in": lambda: A.RandomPerspective(1.1),
    "ColorJitter: hue must be in .-0.5, 0.5., got 0.6": lambda: A.ColorJitter(hue=0.6),
    "GaussianBlur: kernel_size must be odd": lambda: A.GaussianBlur(4),
    "RandomErasing: value must be a number": lambda: A.RandomErasing(value="black"),
    "RandomPosterize: bits must be from 0 to 8": lambda: A.RandomPosterize(9),
    "RandAugment: magnitude must be from 0 to 30, got 31": lambda: A.RandAugment(2, 31),
    "AutoAugment: policy must be one of imagenet": lambda: A.AutoAugment("coco"),
    "AugMix: severity must be from 1 to 10": lambda: A.AugMix(11),
    "from_timm: config must be one that begins with rand": lambda: A.from_timm("rand9"),
    "from_timm: config must be of m from 0 to 10": lambda: A.from_timm("rand-m11"),
    "from_timm: config must be made of m, n": lambda: A.from_timm("rand-z3"),
    "from_timm: config must be of one of the sets": lambda: A.from_timm("rand-tall"),
    "from_timm: config must be of n from 1 to 15": lambda: A.from_timm("rand-n16-tweights"),
    "Pipeline: transforms must be erasing or noise without clip after Normalize": (
        lambda: A.Pipeline(A.Normalize(0.5, 0.5), A.RandomHorizontalFlip())
    ),
    "Pipeline: transforms must be such that Mixup is the last": (
        lambda: A.Pipeline(A.Mixup(), A.RandomHorizontalFlip())
    ),
    "Pipeline: transforms must be of this module, got Linear": (
        lambda: A.Pipeline(torch.nn.Linear(1, 1))
    ),
    "Pipeline: dtype must be of floats with Normalize": (
        lambda: A.Pipeline(A.Normalize(0.5, 0.5), dtype=torch.uint8)
    ),
    "Pipeline: layout must be None or one of NCHW": lambda: A.Pipeline(layout="CHW"),
    "Pipeline: exact must be None or": lambda: A.Pipeline(exact="pillow"),
    "Pipeline: images must be uint8 with exact": (
        lambda: A.Pipeline(exact="torchvision")(torch.zeros(1, 3, 8, 8))
    ),
    "Pipeline: layout must be NCHW or NHWC, got None": lambda: A.Pipeline()(
        torch.zeros(1, 3, 3, 3)
    ),
    "Pipeline: indices must be whole numbers of shape .2,.": (
        lambda: pipeline()(images(2), indices=[1])
    ),
    "Pipeline: indices must be at least 0, got -1": lambda: pipeline()(images(1), indices=[-1]),
    "Pipeline: indices must be below 2..63; of hashes .* got 18446744073709551615": (
        lambda: pipeline()(images(1), indices=torch.tensor([2**64 - 1], dtype=torch.uint64))
    ),
    "Pipeline: indices must be whole numbers from 0 to 2..63 - 1, of shape .1,.": (
        lambda: pipeline()(images(1), indices=[2**64])
    ),
    "Pipeline: images must be all .C, H, W. or all .H, W, C., .* got .3, 8, 9. and .8, 9, 3.": (
        lambda: A.Pipeline()([torch.zeros(3, 8, 9), torch.zeros(8, 9, 3)])
    ),
    "Pipeline: masks must be of the images' sizes, .16, 20., got .3, 4. at 0": lambda: (
        pipeline().apply(torch.zeros(1, 3, 4), pipeline()(images(1), return_params=True)[1])
    ),
    "Pipeline: masks must be .H, W. or .C, H, W. of each sample, got none": (
        lambda: pipeline().apply([], pipeline()(images(1), return_params=True)[1])
    ),
    "Pipeline: masks must be of real numbers, got complex64": lambda: pipeline().apply(
        torch.zeros(1, 16, 20, dtype=torch.complex64),
        pipeline()(images(1), return_params=True)[1],
    ),
    "Pipeline: position must be at least 0, got -1": (
        lambda: pipeline().load_state_dict({"seed": 0, "epoch": 0, "position": -1})
    ),
    "Pipeline: fill must be a value of int8, the masks' dtype, got 255.0": lambda: pipeline().apply(
        torch.zeros(1, 16, 20, dtype=torch.int8),
        pipeline()(images(1), return_params=True)[1],
        fill=255,
    ),
    "RandomChoice: transforms must be a CutMix and a MixUp; .* got MixUp, MixUp": (
        lambda: A.RandomChoice([A.MixUp(), A.MixUp()])
    ),
    "RandomChoice: transforms must be a CutMix and a MixUp; .* got GaussianBlur": (
        lambda: A.RandomChoice([A.GaussianBlur(3)])
    ),
    "RandomChoice: transforms must be alike but for alpha, got num_classes of 5 and None": (
        lambda: A.RandomChoice([A.MixUp(), A.CutMix(num_classes=5)])
    ),
    "RandomChoice: p must be a number for each": (
        lambda: A.RandomChoice([A.MixUp(), A.CutMix()], p=[1, 2, 3])
    ),
    "RandomResizedCrop: antialias must be True, False or None, got 'no'": (
        lambda: A.RandomResizedCrop(8, antialias="no")
    ),
    "Pipeline: boxes must be .N, K, 4. or a list": lambda: pipeline().boxes(
        torch.zeros(1, 2, 5), pipeline()(images(1), return_params=True)[1]
    ),
    "Pipeline: keypoints must be of as many samples as params, 1, got 2": (
        lambda: pipeline().keypoints(
            torch.zeros(2, 2, 2), pipeline()(images(1), return_params=True)[1]
        )
    ),
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_arguments_that_are_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        ARGUMENTS[message]()


@pytest.mark.parametrize("training", [True, False])
def test_a_program_that_would_repeat_its_draws_is_refused(training):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pipeline = augment.Pipeline(augment.RandomHorizontalFlip()).train(training)

        def forward(self, x):
            return self.pipeline(x)

    x = torch.rand(8, 3, 16, 16)
    message = "Pipeline: a pipeline cannot be traced or exported"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(Net(), (x,), check_trace=False)
    with pytest.raises(RuntimeError, match=message):
        torch.export.export(Net(), (x,), strict=False)
    pytest.importorskip("onnx")
    with pytest.raises(RuntimeError, match=message):
        torch.onnx.export(Net(), (x,), io.BytesIO(), dynamo=False)
