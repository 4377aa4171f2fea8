"""A compiled backward has its forward's mask however little it may keep: what a partitioner draws
again is another one, as it does torch's own (pytorch issues 190717 and 190758)."""

import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

from reg_kernels import functional as F

from support import DEVICE


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


def dropout(x):
    return F.dropout(x.sin() + 5, 0.5)


def chain(x):
    x = x.sin()
    # By the residual alone, so that the gradient is the mask.
    return F.batch_norm_act(
        *(x.detach(), None, None, None, None, x + 9, True), activation=None, drop=0.5
    )


FUNCTIONS = {
    "dropout": dropout,
    "dropout1d": lambda x: F.dropout1d((x.sin() + 5).unsqueeze(2), 0.5).squeeze(2),
    "chain": chain,
    "checkpointed": lambda x: checkpoint(dropout, x, use_reentrant=False),
}


def budget(value):
    return torch._functorch.config.patch(activation_memory_budget=value)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_has_the_mask_of_the_output(compiled, name, share):
    def function(x):
        y = FUNCTIONS[name](x)
        return y, (y * y).sin().exp()  # whose gradient needs what could be made anew

    x = torch.randn(64, 16, device=DEVICE, requires_grad=True)
    with budget(share):
        y, z = compiled(function)(x)
        (gradient,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(gradient != 0, y != 0)
    assert 0.2 < float((y != 0).float().mean()) < 0.8


def test_a_budget_of_nothing_is_refused(compiled):
    x = torch.randn(64, 16, device=DEVICE, requires_grad=True)
    with budget(0.0):
        with torch.no_grad():
            compiled(dropout)(x)
        with pytest.raises(Exception, match="activation_memory_budget must be above 0"):
            compiled(dropout)(x)
