"""Noise as a layer, on activations, on weights, and in a linear layer whose noise is learnt."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.overrides import has_torch_function_unary

from .. import backends
from .. import functional as F
from ..ops._checks import check_flag, number, refuse
from ..ops._draw import state_of_all
from ..ops._modes import watcher
from ..ops._noise import non_negative
from ._leaf import call_in_graph

__all__ = ["GaussianDropout", "GaussianNoise", "NoisyLinear", "WeightNoise", "weight_noise"]


class _Noise(torch.nn.Module):
    """What the layers of noise share: a place in fx graphs, and a choice of implementation."""

    std: float
    multiplicative: bool

    def __init__(self, inplace: bool, backend: str | None) -> None:
        super().__init__()
        self.inplace = inplace
        self.backend = None if backend is None else backends.check_name(backend, "backend")

    def forward(self, input: Tensor) -> Tensor:
        if has_torch_function_unary(input) and (call := call_in_graph(self, input)) is not None:
            return call
        return F.gaussian_noise(
            *(input, self.std, self.training, self.inplace),
            multiplicative=self.multiplicative,
            backend=self.backend,
        )


class GaussianNoise(_Noise):
    """Adds normal noise in training, by `functional.gaussian_noise`; any shape.

    Args:
        std: the standard deviation, finite and at least 0, in the input's units.
        multiplicative: True multiplies the noise by the input.
        inplace: True writes over the input.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Raises:
        ValueError: `std` is negative, infinite or NaN, or `backend` is unknown.
        TypeError: `std` is no number.

    Source: as for `functional.gaussian_noise`.
    """

    def __init__(
        self,
        std: float,
        multiplicative: bool = False,
        inplace: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(inplace, backend)
        self.std = non_negative(type(self).__name__, "std", std)
        check_flag(type(self).__name__, "multiplicative", multiplicative)
        self.multiplicative = multiplicative

    def extra_repr(self) -> str:
        return f"std={self.std}, multiplicative={self.multiplicative}, inplace={self.inplace}"


class GaussianDropout(_Noise):
    r"""Multiplies by normal noise of mean 1 in training: :math:`x (1 + \sqrt{p / (1 - p)} z)`.

    The input has any shape. Mean and variance are those of dropout by `p` with inverted scaling.

    Args:
        p: the probability of the dropout that it stands for, in [0, 1).
        inplace: True writes over the input.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Raises:
        ValueError: `p` is outside [0, 1), or `backend` is unknown.
        TypeError: `p` is no number.

    Source: N. Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15 (2014), section 10; Keras' layer of this name.
    """

    multiplicative = True

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, backend: str | None = None
    ) -> None:
        super().__init__(inplace, backend)
        self.p = number(type(self).__name__, "p", p)
        if not 0.0 <= self.p < 1.0:
            refuse(type(self).__name__, "p", "in [0, 1)", self.p, ValueError)

    @property
    def std(self) -> float:  # type: ignore[override]
        """The deviation of what is multiplied by."""
        return math.sqrt(self.p / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class _Straight(torch.autograd.Function):
    """Noisy values forward; backward the gradient goes to the clean ones as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(clean: Tensor, noisy: Tensor) -> Tensor:
        return noisy.view_as(noisy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class WeightNoise(torch.nn.Module):
    r"""Noise on a weight in training, as a parametrization; each use of the weight draws anew.

    In training the weight is :math:`w + \sigma z`, or :math:`w (1 + \sigma z)` where `relative`,
    with standard normal :math:`z`.

    The parameter stays the clean weight: optimizers, weight decay and moving averages see that one,
    and it gets the gradient by the noisy weight as it is. `weight_noise` registers it and keeps the
    module's `state_dict` as it was; `torch.nn.utils.parametrize.register_parametrization` works as
    well, with the keys that it gives.

    Args:
        std: the standard deviation, finite and at least 0: in the weight's units, or of the weight
            where `relative`.
        relative: True multiplies the noise by the weight.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    Shape: the weight may have any shape.

    Raises:
        ValueError: `std` is negative, infinite or NaN, or `backend` is unknown.
        TypeError: `std` is no number.

    Source: A. Graves, "Practical variational inference for neural networks", NIPS 2011.
    """

    def __init__(self, std: float, relative: bool = False, *, backend: str | None = None) -> None:
        super().__init__()
        self.std = non_negative(type(self).__name__, "std", std)
        check_flag(type(self).__name__, "relative", relative)
        self.relative = relative
        self.backend = None if backend is None else backends.check_name(backend, "backend")

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training or self.std == 0.0:
            return weight
        # Weights are no batch, and alike on all ranks: so is their noise.
        state = state_of_all(weight, watcher())
        options: dict[str, Any] = {"multiplicative": self.relative, "backend": self.backend}
        options["rng_state"] = state
        noisy = F.gaussian_noise(weight.detach(), self.std, **options)
        return _Straight.apply(weight, noisy)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the weight is the clean one."""
        return weight

    def extra_repr(self) -> str:
        return f"std={self.std}, relative={self.relative}"


def weight_noise(
    module: torch.nn.Module,
    std: float,
    name: str = "weight",
    *,
    relative: bool = False,
    backend: str | None = None,
) -> torch.nn.Module:
    """Registers `WeightNoise` for a module's parameter and returns the module.

    `state_dict` has the parameter under its own name, so that what is saved with the noise loads
    without it and the other way round. `torch.nn.utils.parametrize.remove_parametrizations(module,
    name)` takes the noise off, in `eval` mode: in training it would leave noise in the weight.

    Args:
        module: a layer with such a parameter.
        std, relative, backend: as in `WeightNoise`.
        name: the parameter's name.

    Raises:
        ValueError: the module has no parameter of that name, or has noise on it already.
    """
    if not isinstance(module, torch.nn.Module):
        refuse("weight_noise", "module", "an nn.Module", type(module).__name__, TypeError)
    if parametrize.is_parametrized(module, name):
        refuse("weight_noise", "name", "one without a parametrization", repr(name), ValueError)
    if name not in module._parameters or module._parameters[name] is None:
        kind = type(module).__name__
        refuse("weight_noise", "name", f"that of a parameter of {kind}", repr(name), ValueError)
    noise = WeightNoise(std, relative, backend=backend)
    training, module.training = module.training, False  # torch tries it out: no draw for that
    try:
        parametrize.register_parametrization(module, name, noise)
    finally:
        module.training = training
    noise.train(training)
    inside = f"parametrizations.{name}.original"

    # Of `of`, this module or a copy of it, whose noise may have been taken off since.
    def rename(of: torch.nn.Module, state: dict[str, Any], old: str, new: str) -> None:
        if old in state and parametrize.is_parametrized(of, name):
            state[new] = state.pop(old)

    def after_saving(
        module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        rename(module, state, prefix + inside, prefix + name)

    def before_loading(
        module: torch.nn.Module, state: dict[str, Any], prefix: str, *further: Any
    ) -> None:
        rename(module, state, prefix + name, prefix + inside)

    module.register_state_dict_post_hook(after_saving)
    module.register_load_state_dict_pre_hook(before_loading)
    return module


class NoisyLinear(torch.nn.Module):
    r"""A linear layer with noise of learnt deviation on weight and bias, factorised.

    In training :math:`y = (\mu + \sigma \odot f(\epsilon_{out}) f(\epsilon_{in})^T) x + \mu_b +
    \sigma_b f(\epsilon_{out})` with :math:`f(e) = \mathrm{sign}(e) \sqrt{|e|}`, after `eval()`
    :math:`y = \mu x + \mu_b`. The noise is the two vectors, and no matrix is made of them.
    `reset_noise` draws them, at the start and whenever it is called.

    Args:
        in_features, out_features: sizes of an input and of an output.
        bias: False leaves the bias out.
        device, dtype: of the parameters.
        std_init: the deviations start at std_init / sqrt(in_features), those of the bias at
            std_init / sqrt(out_features).

    Shape: input (..., in_features), output (..., out_features).

    Raises:
        ValueError: `std_init` is negative, infinite or NaN.
        TypeError: `std_init` is no number.
        RuntimeError: at a call, the input's last dimension is not `in_features`.

    Source: M. Fortunato et al., "Noisy networks for exploration", ICLR 2018, section 3; parameters
    and arguments have the names of torchrl's layer, whose `state_dict` loads.
    """

    noise_in: Tensor
    noise_out: Tensor
    bias_mu: torch.nn.Parameter | None
    bias_sigma: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        std_init: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.std_init = non_negative(type(self).__name__, "std_init", std_init)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.weight_mu = torch.nn.Parameter(empty(out_features, in_features))
        self.weight_sigma = torch.nn.Parameter(empty(out_features, in_features))
        for name in ("bias_mu", "bias_sigma"):
            self.register_parameter(name, torch.nn.Parameter(empty(out_features)) if bias else None)
        self.register_buffer("noise_in", empty(in_features), persistent=False)
        self.register_buffer("noise_out", empty(out_features), persistent=False)
        self.reset_parameters()
        self.reset_noise()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the means uniformly within 1 / sqrt(in_features), sets the deviations."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        self.weight_mu.uniform_(-bound, bound)
        self.weight_sigma.fill_(self.std_init * bound)
        if self.bias_mu is not None and self.bias_sigma is not None:
            self.bias_mu.uniform_(-bound, bound)
            self.bias_sigma.fill_(self.std_init / math.sqrt(max(1, self.out_features)))

    @torch.no_grad()
    def reset_noise(self) -> None:
        """Draws the noise anew."""
        for noise in (self.noise_in, self.noise_out):
            drawn = torch.randn_like(noise)
            noise.copy_(drawn.sign() * drawn.abs().sqrt())

    def forward(self, input: Tensor) -> Tensor:
        y = torch.nn.functional.linear(input, self.weight_mu, self.bias_mu)
        if not self.training:
            return y
        noisy = torch.nn.functional.linear(
            input * self.noise_in, self.weight_sigma, self.bias_sigma
        )
        return torch.addcmul(y, noisy, self.noise_out.to(y.dtype))  # autocast's, where it is on

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *further: Any) -> None:
        for name in ("weight_epsilon", "bias_epsilon"):  # noise that torchrl's layer saves
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *further)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias_mu is not None}, std_init={self.std_init}"
        )
