"""Models that convert(fuse=True) is tried on, and what they are compared by."""

import copy
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import reg_kernels


def convert(model, **options):
    reports = []
    converted = reg_kernels.convert(model, fuse=True, report=reports.append, **options)
    return converted, reports[0]


def chains(report):
    return {name: chain for name, chain, _ in report.fused}


def passes(model, *arguments):
    """What is done in one pass when a model is called: an activation, "+" of a residual, a drop."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with mock.patch.object(
        reg_kernels.functional, "batch_norm_act", wraps=reg_kernels.functional.batch_norm_act
    ) as function:
        model(*arguments)
    for buffer, value in before:
        buffer.copy_(value)
    found = []
    for call in function.call_args_list:
        residual, drop = "+ " * (call.args[5] is not None), call.kwargs["drop"]
        found.append(f"{residual}{call.kwargs['activation']}" + f" {drop}" * (drop > 0))
    return found


def run(model, x, *rest):
    """Output, gradients, buffers."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x, *rest)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}


def assert_same(model, converted, x, *rest):
    """The same values in training and in evaluation, for float64 models without dropout."""
    for training in (True, False):
        expected = run(model.train(training), x, *rest)
        actual = run(converted.train(training), x, *rest)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def disturbed(model):
    """Statistics and parameters that are not where they start, in float64."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for values in (m.running_mean, m.weight, m.bias):
                if values is not None:
                    values.data.normal_()
            if m.running_var is not None:
                m.running_var.data.uniform_(0.5, 2)
    return model.double()


def images(channels=4, size=6):
    return torch.randn(3, channels, size, size, dtype=torch.float64)


# A small ResNet, in the words of torchvision's


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, channels, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inputs, channels, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block=BasicBlock, drop=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._layer(block, 4, 4, 1)
        self.layer2 = self._layer(block, 4 * block.expansion, 6, 2)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(6 * block.expansion, 5)
        self.head = nn.Identity()

    def _layer(self, block, inputs, channels, stride):
        outputs, downsample = channels * block.expansion, None
        if stride != 1 or inputs != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        return nn.Sequential(block(inputs, channels, stride, downsample), block(outputs, channels))

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(self.fc(self.drop(x)))


BLOCKS = [BasicBlock, Bottleneck]


# Smaller ones


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.relu(self.bn2(self.relu(self.bn1(x))) + x))


def sequential(*layers):
    return disturbed(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), *layers))


class Around(nn.Module):
    """act(bn(conv(x))), the rest of it a function of (self, bn's output, x)."""

    def __init__(self, rest, **layers):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.rest = rest
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.rest(self.bn(self.conv(x)), x)


def around(rest, **layers):
    """Around, of a class whose forward calls `rest` as a method: an attribute may change."""
    cls = type("Around", (Around,), {"rest": rest})
    module = cls.__new__(cls)
    Around.__init__(module, None, **layers)
    del module.rest
    return disturbed(module)


class Steps(nn.Module):
    """Forwards in which something happens between the links."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        self.pure = nn.Conv2d(4, 4, 1)


class PureBranch(Steps):
    def forward(self, x):
        h = self.conv(x)
        z = self.bn(h)
        y = self.pure(h)
        return F.relu(z + y)


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.rate = nn.BatchNorm2d(4), 0.5

    def forward(self, x):
        return F.dropout(F.silu(self.bn(x)), self.rate, self.training)


class OwnDropout(FunctionalDropout):
    def __init__(self):
        super().__init__()
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.act(self.bn(x)))


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return -super().forward(input)


def zeros(model, x):
    """Whether dropout is at work, of a model of silu, which has no zeros itself."""
    torch.manual_seed(0)
    return (model(x) == 0).any().item()
