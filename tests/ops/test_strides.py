"""Strides of what an op returns are those of torch's, and so are the strides of its gradients."""

import pytest
import torch
import torch.nn.functional as TF

from reg_kernels import functional as F

from support import DEVICE, implementations, rng_state

on_each = pytest.mark.parametrize("backend", implementations())
last = torch.channels_last
INPUTS = {
    "transposed": lambda: torch.randn(8, 6).t(),
    "part of a transposed": lambda: torch.randn(8, 6).t()[1:],
    "part of channels_last": lambda: torch.randn(2, 4, 3, 5).to(memory_format=last)[:, 1:],
    "cropped channels_last": lambda: torch.randn(2, 4, 3, 5).to(memory_format=last)[:, :, 1:],
    "part of channels_last_3d": lambda: torch.randn(2, 4, 2, 3, 5).to(
        memory_format=torch.channels_last_3d
    )[:, 1:],
    "turned images": lambda: torch.randn(2, 4, 3, 5).transpose(2, 3),
    "part of turned images": lambda: torch.randn(2, 4, 3, 5).transpose(2, 3)[:, 1:],
    "channels first": lambda: torch.randn(4, 2, 3, 5).transpose(0, 1),
    "every other": lambda: torch.randn(2, 4, 6)[:, :, ::2],
    "expanded": lambda: torch.randn(1, 4, 3, 5).expand(2, 4, 3, 5),
    "one sample of many": lambda: torch.randn(3, 4, 5, 2)[1:2, :, ::2],
}
each = pytest.mark.parametrize("name", INPUTS)


def strides(x):
    """Of dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def draw(name):
    return INPUTS[name]().to(DEVICE).requires_grad_()


def statistics(x):
    return x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])


def channel_dropout(module, x):
    return getattr(module, f"dropout{max(x.dim() - 2, 1)}d")


@on_each
@each
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dropout(name, requires_grad, backend):
    x = draw(name).detach().requires_grad_(requires_grad)
    y = F.dropout(x, 0.5, rng_state=rng_state(), backend=backend)
    assert strides(y) == strides(TF.dropout(x))
    # In storage order where that is defined, else in contiguous order, as ever.
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    other = x.detach() if dense else x.detach().contiguous()
    assert torch.equal(y, F.dropout(other, 0.5, rng_state=rng_state()))
    if requires_grad:
        g = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, x, g)[0] * x, y * g)


@on_each
@each
def test_channel_dropout(name, backend):
    x = draw(name)
    if x.dim() == 2:
        x = x.unsqueeze(2)
    options = {"p": 0.5, "rng_state": rng_state(), "backend": backend}
    y = channel_dropout(F, x)(x, **options)
    assert strides(y) == strides(channel_dropout(TF, x)(x))
    assert torch.equal(y, channel_dropout(F, x)(x.detach().contiguous(), **options))


@on_each
@each
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(name, training, backend):
    x = draw(name)
    y = F.batch_norm(x, *statistics(x), training=training, backend=backend)
    expected = TF.batch_norm(x, *statistics(x), training=training)
    assert strides(y) == strides(expected)
    torch.testing.assert_close(y, expected)
    act = F.batch_norm_act(
        *(x, *statistics(x), None, None, x, training), activation=None, backend=backend
    )
    assert strides(act) == strides(expected + x)
    torch.testing.assert_close(act, expected + x)


@on_each
@each
def test_the_chain_drops_what_its_parts_drop(name, backend):
    x = draw(name)
    y = F.batch_norm_act(
        *(x, *statistics(x), None, None, x, True),
        activation=None,
        drop=0.5,
        rng_state=rng_state(),
        backend=backend,
    )
    parts = F.batch_norm(x, *statistics(x), training=True) + x
    torch.testing.assert_close(y, F.dropout(parts, 0.5, rng_state=rng_state()))


@on_each
@each
def test_penalties(name, backend):
    x = draw(name)
    for power, function in ((1, F.l1_penalty), (2, F.l2_penalty)):
        value = function([x], backend=backend)
        torch.testing.assert_close(value, (x.abs() ** power).sum())
        (gradient,) = torch.autograd.grad(value, x)
        expected = x.detach().sign() if power == 1 else 2 * x.detach()
        assert strides(gradient) == strides(expected)
        assert torch.equal(gradient, expected)


def test_mixup():
    x = INPUTS["part of channels_last"]().to(DEVICE)
    y = F.mixup(x, 0.25)
    expected = 0.25 * x + 0.75 * x.flip(0)
    assert strides(y) == strides(expected)
    torch.testing.assert_close(y, expected)


@each
def test_compiled(name):
    def function(x, state):
        y = F.dropout(x, 0.5, rng_state=state)
        return y, F.batch_norm(x, None, None, training=True), F.mixup(x, 0.5)

    torch._dynamo.reset()
    x = draw(name).detach()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(x, rng_state()), function(x, rng_state()), strict=True):
        assert ours.stride() == eager.stride()
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
