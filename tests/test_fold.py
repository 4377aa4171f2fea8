"""fold_batch_norm: the same function without the BatchNorm layers, or a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reg_kernels
from reg_kernels import fold_batch_norm
from reg_kernels.convert import _fold
from reg_kernels.convert._fused import FusedSequential


@pytest.fixture(autouse=True)
def _reference():
    # These are about graphs: one implementation of the ops is as good as another.
    with reg_kernels.backend("reference"):
        yield


def fold(model, **options):
    reports = []
    folded = fold_batch_norm(model, report=reports.append, **options)
    return folded, reports[0]


def disturbed(model, dtype=torch.float64):
    """For evaluation, with statistics and parameters that are not where they start."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for values in (m.running_mean, m.weight, m.bias):
                if values is not None:
                    values.data.normal_()
            if m.running_var is not None:
                m.running_var.data.uniform_(0.5, 2)
    return model.to(dtype).eval()


def assert_same(model, folded, x, *rest):
    expected, actual = model(x, *rest), folded(x, *rest)
    bound = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


LAYERS = {
    "Conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d, (2, 4, 7, 7)),
    "Conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "Linear": (nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer, affine, bias, dtype):
    before, norm, shape = copy.deepcopy(LAYERS[layer])
    if not bias:
        before.bias = None
    net = disturbed(nn.Sequential(before, norm(6, affine=affine, eps=1e-3), nn.ReLU()), dtype)
    folded, report = fold(net)
    assert report.folded == [("1", "0")] and report.left == []
    assert norms(folded) == [] and len(norms(net)) == 1
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype
    assert folded[0].bias.requires_grad
    assert_same(net, folded, torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("swap", [lambda m: m, reg_kernels.convert], ids=["torch", "converted"])
def test_our_layers_and_torchs(swap):
    net = swap(disturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    folded, report = fold(net)
    assert report.folded == [("1", "0")]
    assert type(folded[1]) is nn.Identity
    assert_same(net, folded, torch.randn(2, 3, 5, 5, dtype=torch.float64))


def test_what_follows_a_batch_norm_act_remains():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = reg_kernels.nn.BatchNormAct2d(
                4, activation="leaky_relu", negative_slope=0.25, drop=0.5
            )

        def forward(self, x):
            return self.norm(self.conv(x), x)

    net = disturbed(Block())
    folded, report = fold(net)
    assert report.folded == [("norm", "conv")]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_same(net, folded, x)
    assert (folded.train()(x) == 0).any()  # its dropout still follows the flag
    assert "leaky_relu" in repr(folded)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.last = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())
        self.side = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        out = self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))
        out += self.side(x)
        return self.last(F.silu(out))


def test_a_block():
    net = disturbed(Block())
    folded, report = fold(net)
    assert sorted(report.folded) == [("bn1", "conv1"), ("bn2", "conv2"), ("side.1", "side.0")]
    ((name, cls, why),) = report.left
    assert (name, cls) == ("last.0", "torch.nn.BatchNorm2d")
    assert why == "no convolution or linear layer comes before it in the same forward"
    assert type(folded) is Block and type(folded.bn1) is nn.Identity
    assert_same(net, folded, torch.randn(2, 4, 5, 5, dtype=torch.float64))
    assert str(report).splitlines()[0] == "3 folded, 1 left as they were"
    assert "  bn1 into conv1" in str(report)


def test_a_fused_model():
    """What was not folded stays fused."""
    net = disturbed(Block())
    fused = reg_kernels.convert(net, fuse=True, backend="reference")
    folded, report = fold(fused)
    assert len(report.folded) == 3
    assert isinstance(folded.last, FusedSequential)
    assert folded.last[0].backend == "reference"
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_same(net, folded, x)
    assert_same(net, fused, x)  # that is another object, whose layers were not touched
    assert type(fused.bn1) is reg_kernels.nn.BatchNorm2d
    assert_same(net, reg_kernels.revert(folded), x)


def test_in_place_or_in_a_copy():
    net = disturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    original = copy.deepcopy(net)
    before = copy.deepcopy(net.state_dict())
    fold_batch_norm(net)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
    assert fold_batch_norm(net, inplace=True) is net
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    assert_same(original, net, torch.randn(2, 3, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("fuse", [False, True])
def test_training_mode_is_an_error_and_changes_nothing(fuse):
    net = disturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block()))
    net = reg_kernels.convert(net, fuse=fuse)
    net[3].bn2.train()
    before, classes = copy.deepcopy(net.state_dict()), repr(net)
    message = "fold_batch_norm: 3.bn2 must be in evaluation mode, got training mode"
    with pytest.raises(RuntimeError, match=message):
        fold_batch_norm(net, inplace=True)
    assert repr(net) == classes
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )


def test_one_that_cannot_be_folded_may_be_training():
    net = disturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))).train()
    assert fold(net)[1].folded == []


def test_bad_model():
    with pytest.raises(TypeError, match=r"fold_batch_norm: model must be an nn\.Module, got list"):
        fold_batch_norm([])


# What stays


class Own(nn.BatchNorm2d):
    pass


class OwnConv(nn.Conv2d):
    pass


def hooked():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net[0].register_forward_hook(lambda m, i, o: o * 2)
    return net


def hooked_norm():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net[1].register_forward_hook(lambda m, i, o: o * 2)
    return net


def weight_norm():
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def shared():
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), conv)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class WeightIsRead(UsedTwice):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.mean()


class ByFunction(UsedTwice):
    def forward(self, x):
        return self.bn(F.conv2d(x, self.conv.weight, self.conv.bias))


class Branches(UsedTwice):
    def forward(self, x):
        x = self.conv(x)
        return self.bn(x) if x.sum() > 0 else x


STAYS = {
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        "it has no running statistics",
    ),
    "something between": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        "no convolution or linear layer comes before it",
    ),
    "own": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Own(4)), "not one of torch's"),
    "own conv": (lambda: nn.Sequential(OwnConv(4, 4, 1), nn.BatchNorm2d(4)), "no convolution"),
    "hooks": (hooked, "0 has hooks"),
    "hooks of the norm": (hooked_norm, "it has hooks"),
    "weight norm": (weight_norm, "no convolution"),
    "shared": (shared, "0 is called more than once"),
    "used twice": (UsedTwice, "the result of conv is used elsewhere"),
    "weight read": (WeightIsRead, "conv has its values read"),
    "by function": (ByFunction, "no convolution"),
    "branches": (Branches, "the forward of the model cannot be traced: it branches"),
    "linear of images": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm2d(4)),
        "not the features of the linear layer",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_and_why(case):
    make, reason = STAYS[case]
    net = disturbed(make())
    folded, report = fold(net)
    assert report.folded == []
    ((_, _, why),) = report.left
    assert reason in why
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(folded(x), net(x))


def test_a_linear_layers_features_must_be_the_channels():
    """(N, L, C) has its channels elsewhere, which only a call shows."""
    net = disturbed(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)))
    folded, report = fold(net)
    assert "its channels are not those of 0" in report.left[0][2]
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(folded(x), net(x))

    net = disturbed(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    folded, _ = fold(net)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    net(x)
    with pytest.raises(ValueError, match=r"fold_batch_norm: input .* must be \(N, C\), got 3 dims"):
        folded(x)


def test_a_sequential_inside_a_forward_that_cannot_be_traced():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    net = disturbed(Outer())
    folded, report = fold(net)
    assert report.folded == [("inner.1", "inner.0")]
    assert_same(net, folded, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_what_training_alone_does_is_no_obstacle():
    class Noisy(UsedTwice):
        def forward(self, x):
            if self.training:
                x = x + torch.randn_like(x)
            return self.bn(self.conv(x))

    net = disturbed(Noisy())
    folded, report = fold(net)
    assert report.folded == [("bn", "conv")]
    assert_same(net, folded, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modules_of_torchscript_are_left_alone():
    inner = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval())
    net = disturbed(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), inner))
    folded, report = fold(net)
    assert report.folded == [("1", "0")]
    ((name, _, why),) = report.left
    assert name == "2" and "TorchScript" in why
    assert_same(net, folded, torch.randn(2, 4, 6, 6, dtype=torch.float64))


def test_only_what_was_fused_stays_so():
    net = disturbed(nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), Block()))
    net[0] = reg_kernels.convert(net[0], fuse=True)
    folded, report = fold(net)
    assert len(report.folded) == 3
    assert isinstance(folded[0], FusedSequential)
    assert type(folded[1].last[0]) is nn.BatchNorm2d  # torch's, as it was


def test_folding_that_fails_changes_nothing(monkeypatch):
    net = disturbed(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Block()))
    reg_kernels.convert(net, fuse=True, inplace=True)
    before, values = [type(m) for m in net.modules()], copy.deepcopy(net.state_dict())
    weights, calls = _fold._weights, []

    def fails(norm, layer):
        calls.append(norm)
        if len(calls) == 3:
            raise MemoryError
        return weights(norm, layer)

    monkeypatch.setattr(_fold, "_weights", fails)
    with pytest.raises(MemoryError):
        fold_batch_norm(net, inplace=True)
    assert [type(m) for m in net.modules()] == before
    assert all(torch.equal(values[name], value) for name, value in net.state_dict().items())


def test_a_tied_weight_is_not_written():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    net[2].weight = net[0].weight
    disturbed(net)
    folded, _ = fold(net)
    assert torch.equal(folded[2].weight, net[0].weight)
    assert_same(net, folded, torch.randn(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    "layers", [(nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64)), (nn.Linear(4, 64), nn.BatchNorm1d(64))]
)
def test_half_precision_weights_are_rounded_once(layers):
    net = disturbed(nn.Sequential(*layers), torch.float32)
    exact, _ = fold(copy.deepcopy(net).double())
    mixed = copy.deepcopy(net)
    mixed[0].to(torch.bfloat16)
    exact[0].weight.data = fold(copy.deepcopy(mixed).double())[0][0].weight.data
    folded, _ = fold(mixed)
    assert folded[0].weight.dtype == torch.bfloat16
    assert torch.equal(folded[0].weight, exact[0].weight.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["torchvision.models", "timm"])
def test_a_resnet_of(library, name):
    try:
        models = pytest.importorskip(library)
    except RuntimeError as error:
        pytest.skip(f"{library} does not load: {error}")
    net = models.create_model(name) if library == "timm" else getattr(models, name)()
    disturbed(net)
    folded, report = fold(net)
    assert norms(folded) == [] and report.left == []
    assert_same(net, folded, torch.randn(1, 3, 64, 64, dtype=torch.float64))
