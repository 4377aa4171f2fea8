"""convert(fuse=True) on random modules: values, gradients and buffers are those of the model."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reg_kernels

CHANNELS = 2
GRAPHS, A_TEST = 240, 30


STEPS = [*["norm"] * 4, *["activation"] * 4, *["sum"] * 3, *["residual"] * 3, *["inner"] * 2]
STEPS += ["dropout", "other", "write_between"]


class Program:
    """The source of a random forward, and the layers that it calls."""

    def __init__(self, rng, depth, shared):
        self.rng, self.depth, self.shared = rng, depth, shared
        self.layers, self.lines, self.values = {}, [], ["x"]
        for _ in range(rng.randint(3, 10)):
            getattr(self, f"add_{rng.choice(STEPS)}")()
        if rng.random() < 0.5:  # what came last is used, and often all of it
            self.lines.append(f"return {self.values[-1]}")
        else:
            self.lines.append(f"return {' + '.join(sorted(set(self.values[-3:])))}")

    def value(self):
        recent = self.values[-1] if self.rng.random() < 0.6 else None
        return recent or self.rng.choice(self.values)

    def put(self, expression):
        name = f"v{len(self.lines)}" if self.rng.random() < 0.7 else self.rng.choice(self.values)
        self.lines.append(f"{name} = {expression}")
        if name in self.values:
            self.values.remove(name)
        self.values.append(name)

    def layer(self, kind, make):
        """A layer of its own, one that it has, or one that other modules have, too."""
        own = [name for name in self.layers if name.startswith(kind)]
        if own and self.rng.random() < 0.25:
            return f"self.{self.rng.choice(own)}"
        if self.shared.get(kind) and self.rng.random() < 0.25:
            made = self.rng.choice(self.shared[kind])
        else:
            made = make()
            self.shared.setdefault(kind, []).append(made)
        name = f"{kind}{len(self.layers)}"
        holder = self.rng.choice(["", "", "", "list", "dict"])
        if not holder:
            self.layers[name] = made
            return f"self.{name}"
        if holder == "list":
            held = self.layers.setdefault("list", nn.ModuleList())
            held.append(made)
            return f"self.list[{len(held) - 1}]"
        self.layers.setdefault("dict", nn.ModuleDict())[name] = made
        return f"self.dict[{name!r}]"

    def norm(self):
        options = self.rng.choice([{}, {}, {"affine": False}, {"momentum": None}])
        # A channel that relu closed has no variance, and with torch's eps each norm behind it would
        # make its rounding 300 times larger.
        return nn.BatchNorm2d(CHANNELS, eps=0.1, **options)

    def activation(self):
        kind = self.rng.choice([nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU])
        if kind is nn.GELU:
            return nn.GELU(self.rng.choice(["none", "none", "tanh"]))
        inplace = self.rng.random() < 0.3
        return nn.LeakyReLU(0.25, inplace) if kind is nn.LeakyReLU else kind(inplace)

    def add_norm(self):
        self.put(f"{self.layer('norm', self.norm)}({self.value()})")

    def add_activation(self):
        value = self.value()
        if self.rng.random() < 0.5:
            self.put(f"{self.layer('act', self.activation)}({value})")
            return
        forms = ["F.relu({})", "torch.relu({})", "{}.relu()", "{}.relu_()", "F.silu({})"]
        forms += ["F.leaky_relu({}, 0.5)", "F.gelu({})", "F.relu({}, inplace=True)"]
        self.put(self.rng.choice(forms).format(value))

    def add_sum(self):
        forms = ["{} + {}", "{} + {}", "torch.add({}, {})", "{}.add({})", "{}.add_({})"]
        form = self.rng.choice([*forms, None])
        first, second = self.value(), self.rng.choice(self.values)
        if form is not None:
            self.put(form.format(first, second))
        else:
            self.lines.append(f"{first} += {second}")

    def add_residual(self):
        """A whole chain, or two that meet."""
        first = f"{self.layer('norm', self.norm)}({self.value()})"
        second = self.value()
        if self.rng.random() < 0.5:
            second = f"{self.layer('norm', self.norm)}({second})"
            if self.rng.random() < 0.3:
                second = f"F.relu({second})"
        self.put(f"{first} + {second}")
        self.add_activation()

    def add_write_between(self):
        """A chain, and a write to what it reads before it ends."""
        read, other = self.value(), self.value()
        writes = ["{}.mul_(0.5)", "{}.relu_()", "{} += x", "{}.view(x.shape).add_(1)"]
        writes += [f"{self.layer('act', self.activation)}({{}})", "torch.add(x, 1, out={})"]
        self.lines.append(f"y = {self.layer('norm', self.norm)}({read})")
        if self.rng.random() < 0.5:
            self.lines.append(f"y = y + {other}")
            read = self.rng.choice([read, other])
        self.lines.append(self.rng.choice(writes).format(read))
        self.put("F.relu(y)")

    def add_dropout(self):
        if self.rng.random() < 0.3:
            self.put(f"F.dropout({self.value()}, 0.0, self.training)")
        else:
            self.put(f"{self.layer('drop', lambda: nn.Dropout(0.5))}({self.value()})")

    def add_other(self):
        forms = ["{} * 0.5", "{}.view(x.shape)", "{}.mul_(0.5)", "self.conv({})", "self.same({})"]
        self.layers.setdefault("conv", nn.Conv2d(CHANNELS, CHANNELS, 1))
        self.layers.setdefault("same", nn.Identity())
        self.put(self.rng.choice(forms).format(self.value()))

    def add_inner(self):
        if self.depth == 0:
            return self.add_activation()
        if self.rng.random() < 0.5:
            inner = self.layer("inner", lambda: module(self.rng, self.depth - 1, self.shared))
        else:
            inner = self.layer("seq", self.sequential)
        self.put(f"{inner}({self.value()})")

    def sequential(self):
        makers = [self.norm, self.activation, nn.Identity, lambda: nn.Dropout(0.5), self.norm]
        layers = [self.rng.choice(makers)() for _ in range(self.rng.randint(1, 5))]
        if self.rng.random() < 0.3:
            layers.append(self.rng.choice(layers))
        return nn.Sequential(*layers)


def module(rng, depth, shared):
    program = Program(rng, depth, shared)
    source = "\n    ".join(["def forward(self, x):", *program.lines])
    scope = {"torch": torch, "F": F}
    exec(compile(source, "<a random forward>", "exec"), scope)
    net = type("Random", (nn.Module,), {"forward": scope["forward"], "source": source})()
    for name, layer in program.layers.items():
        net.add_module(name, layer)
    return net


def model(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net = module(rng, rng.randint(0, 2), {}).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            for values in (m.weight, m.bias):
                if values is not None:
                    values.data.normal_()
        if rng.random() < 0.1:
            m.eval()  # on its own, until the model's flag is set
    return net


def run(net, x, gradients):
    """What comes of a call: output, input as it is left, gradients, buffers, which move back."""
    leaf = x.clone().requires_grad_(gradients)
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    net.zero_grad()
    torch.manual_seed(1)
    try:
        with torch.set_grad_enabled(gradients):
            given = leaf * 1  # may be written to
            output = net(given)
            if gradients:
                (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found = {"output": output.detach(), "input": given.detach(), "its gradient": leaf.grad}
        found |= {name: buffer.clone() for name, buffer in net.named_buffers()}
        found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
        return found
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def assert_same(net, fused, x, gradients):
    try:
        expected = run(net, x, gradients)
    except RuntimeError as error:  # a value that a backward needs was written over
        assert gradients and ("inplace operation" in str(error) or "out=" in str(error)), error
        return
    actual = run(fused, x, gradients)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None:
            torch.testing.assert_close(
                actual[name], value, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )


def check(seed):
    net = model(seed)
    reports = []
    fused = reg_kernels.convert(net, fuse=True, report=reports.append)
    one_by_one = reg_kernels.convert(net)  # with the same masks
    x = torch.randn(3, CHANNELS, 2, 2, dtype=torch.float64)
    assert_same(one_by_one, fused, x, True)  # the flags as they are
    assert_same(one_by_one.train(), fused.train(), x, True)
    assert_same(net.eval(), fused.eval(), x, True)
    for m in (net.train(), fused.train()):
        for layer in m.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    for gradients in (True, False):
        assert_same(net, fused, x, gradients)
    reg_kernels.revert(fused, inplace=True)
    assert [type(m) for m in fused.modules()] == [type(m) for m in net.modules()]
    return len(reports[0].fused)


@pytest.mark.parametrize("first", range(0, GRAPHS, A_TEST))
def test_random_modules(first):
    chains = 0
    for seed in range(first, first + A_TEST):
        try:
            chains += check(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert chains > A_TEST  # else the modules are too poor to tell anything
