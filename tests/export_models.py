"""A model that has every kind of layer, for what exports it."""

import torch
from torch import nn

import reg_kernels


class EveryLayer(nn.Module):
    """Of images (N, 3, H, W); `convert` does the rest. To train, the BatchNorm across ranks, which
    needs a process group then, is a plain one."""

    def __init__(self, drop=0.2, mode="row", training=False):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.act2, self.drop = nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(drop)
        self.drop2d = nn.Dropout2d(drop)
        self.path = reg_kernels.nn.DropPath(drop)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.block = reg_kernels.nn.StochasticDepthBlock(nn.Conv2d(8, 8, 1), drop, mode)
        self.noise = reg_kernels.nn.GaussianNoise(drop)
        last = reg_kernels.nn.BatchNormAct2d if training else reg_kernels.nn.SyncBatchNormAct
        self.last = last(8, activation="gelu")
        self.noisy = reg_kernels.nn.NoisyLinear(8, 6)
        self.head = reg_kernels.nn.weight_noise(nn.Linear(6, 5), drop)

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        y = self.drop2d(self.drop(self.act2(self.bn2(self.again(y)) + y)))
        y = y + self.path(self.again(y))
        y = y + self.path(self.gamma * self.again(y))
        y = self.last(self.block(self.noise(y)))
        return self.head(self.noisy(y.mean((2, 3))))

    @classmethod
    def to_train(cls, drop=0.2, mode="row", fuse=True):
        """Such a model, converted, in training mode."""
        return reg_kernels.convert(trained(cls(drop, mode, training=True)), fuse=fuse).train()


def trained(net):
    """The net with statistics that are not where they start."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net


def images(count=4):
    return torch.randn(count, 3, 8, 8)


def calls(program):
    """The operations of a program, by name."""
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
