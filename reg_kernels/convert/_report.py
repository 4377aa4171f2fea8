"""What `convert` and `revert` tell of what they did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Conversion:
    """What `convert` or `revert` did. It prints as a list of layers.

    Attributes:
        fused: (name of the BatchNorm, the chain, the BatchNorm's class) of each chain.
        apart: (name, class, reason) of what could not be fused.
        swapped: (name, old class, new class) of each layer that was swapped.
        left: (name, class, reason) of each layer that stayed.
    """

    fused: list[tuple[str, str, str]] = field(default_factory=list)  # BatchNorm, chain, its class
    apart: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, why not fused
    swapped: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, new class
    left: list[tuple[str, str, str]] = field(default_factory=list)  # name, class, reason

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left as they were"]
        if self.fused or self.apart:
            chains = "chain" if len(self.fused) == 1 else "chains"
            lines[0] = f"{len(self.fused)} {chains} fused, {lines[0]}"
        lines += [f"  {name or '(model)'}: {chain} in one pass" for name, chain, _ in self.fused]
        lines += [f"  {name or '(model)'}: {cls}: {why}" for name, cls, why in self.apart]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, old, new in self.swapped]
        lines += [f"  {name or '(model)'}: {old} left: {why}" for name, old, why in self.left]
        return "\n".join(lines)


def qualified(cls: type) -> str:
    module = cls.__module__
    if module.startswith("torch.nn."):
        module = "torch.nn"
    for package in ("reg_kernels.nn", "reg_kernels.convert"):
        if module.startswith(f"{package}."):
            module = package
    return f"{module}.{cls.__name__}"
