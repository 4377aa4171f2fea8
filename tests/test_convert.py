"""Swapping layers: what changes, what stays, what is reported."""

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import prune

import reg_kernels
from reg_kernels.convert import twin_of


class OwnDropout(nn.Dropout):
    def forward(self, input):
        return input * 3


def model():
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.25),
        nn.Sequential(nn.Dropout2d(0.5, inplace=True), nn.AlphaDropout(0.1)),
        OwnDropout(0.1),
    )


def test_a_copy_is_converted_and_the_model_is_not():
    original = model()
    converted = reg_kernels.convert(original)
    assert type(original[2]) is nn.Dropout
    assert type(converted[1]) is reg_kernels.nn.BatchNorm1d
    assert type(converted[2]) is reg_kernels.nn.Dropout
    assert type(converted[3][0]) is reg_kernels.nn.Dropout2d
    assert (converted[3][0].p, converted[3][0].inplace) == (0.5, True)
    assert type(converted[4]) is OwnDropout


def test_everything_else_stays_the_same_object():
    net = model()
    hooks = []
    net[2].register_forward_hook(lambda *_: hooks.append(1))
    net[2].eval()
    net[2].note = "kept"
    layers, parameters = list(net.modules()), list(net.parameters())
    keys = list(net.state_dict())
    assert reg_kernels.convert(net, inplace=True) is net
    assert all(a is b for a, b in zip(layers, net.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert list(net.state_dict()) == keys
    assert not net[2].training
    assert net[2].note == "kept"
    net[2](torch.ones(3))
    assert hooks == [1]


def test_revert_undoes_it():
    net = model()
    before = repr(net)
    reg_kernels.convert(net, inplace=True, backend="reference")
    assert net[2].backend == "reference"
    reg_kernels.revert(net, inplace=True)
    assert type(net[2]) is nn.Dropout
    assert "backend" not in net[2].__dict__
    assert repr(net) == before
    assert type(reg_kernels.revert(reg_kernels.convert(net))[3][0]) is nn.Dropout2d


def test_the_report_says_what_and_why():
    reports = []
    reg_kernels.convert(model(), report=reports.append)
    (report,) = reports
    assert ("1", "torch.nn.BatchNorm1d", "reg_kernels.nn.BatchNorm1d") in report.swapped
    assert ("2", "torch.nn.Dropout", "reg_kernels.nn.Dropout") in report.swapped
    assert {name for name, _, _ in report.left} == {"3.1", "4"}
    text = str(report)
    assert text.splitlines()[0] == "3 swapped, 2 left as they were"
    assert "OwnDropout left: a subclass of torch.nn.Dropout" in text
    assert "3.1: torch.nn.AlphaDropout left: there is no fused twin" in text
    again = []
    reg_kernels.convert(reg_kernels.convert(model()), report=again.append)
    assert again[0].swapped == []
    assert ("2", "reg_kernels.nn.Dropout", "fused already") in again[0].left


def test_layers_of_ones_own_choice_are_left():
    reports = []
    net = nn.Sequential(reg_kernels.nn.BatchNormAct1d(4), nn.AlphaDropout(0.5))
    converted = reg_kernels.convert(net, report=reports.append)
    assert [type(m) for m in converted] == [type(m) for m in net]
    assert reports[0].left == [
        ("0", "reg_kernels.nn.BatchNormAct1d", "fused already"),
        ("1", "torch.nn.AlphaDropout", "there is no fused twin of it"),
    ]
    assert type(reg_kernels.revert(converted)[0]) is reg_kernels.nn.BatchNormAct1d


def test_a_shared_layer_stays_shared():
    shared = nn.Dropout(0.5)
    net = nn.ModuleDict({"a": shared, "b": shared})
    converted = reg_kernels.convert(net)
    assert converted["a"] is converted["b"]
    assert type(converted["a"]) is reg_kernels.nn.Dropout


def test_a_single_layer_is_a_model():
    assert type(reg_kernels.convert(nn.Dropout(0.5))) is reg_kernels.nn.Dropout


def test_the_converted_model_trains():
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    converted = reg_kernels.convert(net)
    x = torch.ones(3, 4)
    assert torch.equal(net.eval()(x), converted.eval()(x))
    converted.train()(x).sum().backward()
    assert converted[0].weight.grad is not None


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"convert: model must be an nn\.Module, got list"):
        reg_kernels.convert([nn.Dropout()])
    with pytest.raises(TypeError, match=r"revert: model must be an nn\.Module, got dict"):
        reg_kernels.revert({})
    net = nn.Sequential(nn.Dropout())
    with pytest.raises(ValueError, match="backend must be one of"):
        reg_kernels.convert(net, inplace=True, backend="fast")
    assert type(net[0]) is nn.Dropout


def test_a_twin_must_be_a_subclass():
    with pytest.raises(TypeError, match="must be a subclass of Dropout"):
        twin_of(nn.Dropout)(nn.Linear)


# Models that have no copy


def old_weight_norm(layer):
    torch.nn.utils.weight_norm(layer)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def own(layer):
    layer.handle = (i for i in ())  # generators have none either


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", [old_weight_norm, pruned, own])
@pytest.mark.parametrize("name", ["convert", "revert", "fold_batch_norm"])
def test_a_model_that_cannot_be_copied(name, change):
    net = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    change(net[2][0])
    net.eval()
    if name == "revert":
        reg_kernels.convert(net, inplace=True, fuse=True)
    expected, function = net(torch.ones(2, 4)), getattr(reg_kernels, name)
    message = rf"^{name}: model cannot be copied, because of 2\.0 \(Linear\): \w+: .*inplace=True"
    with pytest.raises(RuntimeError, match=message) as caught:
        function(net)
    assert caught.value.__cause__ is not None
    assert function(net, inplace=True) is net
    torch.testing.assert_close(net(torch.ones(2, 4)), expected)


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*lazy")
def test_a_lazy_layer_is_left_until_it_is_one():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU())
    reports = []
    reg_kernels.convert(net, inplace=True, fuse=True, report=reports.append)
    assert [(n, cls.rpartition(".")[2]) for n, cls, _ in reports[0].left] == [
        ("0", "LazyLinear"),
        ("1", "LazyBatchNorm1d"),
    ]
    net(torch.ones(2, 3))
    assert type(reg_kernels.convert(net, fuse=True)[1]) is reg_kernels.nn.BatchNorm1d


# Layers in graphs of torch.fx


rk = reg_kernels.nn
X = torch.randn(4, 3)
LAYERS = {
    "Dropout": (rk.Dropout(), (X,)),
    "Dropout1d": (rk.Dropout1d(), (torch.randn(2, 3, 4),)),
    "Dropout2d": (rk.Dropout2d(), (torch.randn(2, 3, 4, 4),)),
    "Dropout3d": (rk.Dropout3d(), (torch.randn(2, 3, 2, 2, 2),)),
    "BatchNorm1d": (rk.BatchNorm1d(3), (X,)),
    "BatchNorm2d": (rk.BatchNorm2d(3), (torch.randn(2, 3, 4, 4),)),
    "BatchNorm3d": (rk.BatchNorm3d(3), (torch.randn(2, 3, 2, 2, 2),)),
    "BatchNormAct1d": (rk.BatchNormAct1d(3, drop=0.5), (X,)),
    "with a residual": (rk.BatchNormAct1d(3, drop=0.5), (X, torch.randn(4, 3))),
    "CrossEntropyLoss": (rk.CrossEntropyLoss(), (X, torch.tensor([0, 1, 2, 0]))),
    "DistillationLoss": (rk.DistillationLoss(), (X, -X, torch.tensor([0, 1, 2, 0]))),
}


class Root(nn.Module):
    """With as many arguments as a layer has, which fx has to know."""

    def __init__(self, layer):
        super().__init__()
        self.inner = nn.ModuleList([layer])


class One(Root):
    def forward(self, x):
        return self.inner[0](x * 2)


class Two(Root):
    def forward(self, x, y):
        return self.inner[0](x * 2, y)


class Three(Root):
    def forward(self, x, y, z):
        return self.inner[0](x * 2, y, z)


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_one_call_in_a_graph(case):
    layer, arguments = LAYERS[case]
    net = (One, Two, Three)[len(arguments) - 1](layer)
    graph = fx.symbolic_trace(net)
    (call,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert call.target == "inner.0" and graph.get_submodule("inner.0") is layer
    again = fx.Transformer(graph).transform()  # which is a tracer, too
    for training in (True, False):
        for module in (graph, again):
            torch.manual_seed(0)
            expected = net.train(training)(*arguments)
            torch.manual_seed(0)
            assert torch.equal(module.train(training)(*arguments), expected)


def test_a_layer_that_is_traced_by_itself_is_traced_into():
    for layer in (rk.Dropout(), rk.BatchNorm1d(3)):
        graph = fx.symbolic_trace(layer.eval())
        assert not any(node.op == "call_module" for node in graph.graph.nodes)
        assert torch.equal(graph(X), layer(X))
    node = fx.Graph().placeholder("x")
    assert isinstance(rk.Dropout()(fx.Proxy(node)), fx.Proxy)  # outside of any module


def test_a_graph_follows_eval_and_train():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    graph = fx.symbolic_trace(reg_kernels.convert(net)).eval()
    before = graph.state_dict()["0.running_mean"].clone()
    assert torch.equal(graph(X), net.eval()(X))
    assert torch.equal(graph.state_dict()["0.running_mean"], before)
    assert (graph.train()(X) == 0).any()
