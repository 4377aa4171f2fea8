"""Fusing BatchNorm → (+ residual) → activation → Dropout, and (layer scale →) DropPath → +
shortcut, wherever a module's own forward has them.

Every module is read by itself, its layers as single calls, so that a chain lies in one forward. Its
layers stay what they are; the module whose forward calls them gets a class that hands them over
together, to be looked at again at each call (`_chain`):

- nn.Sequential, and what inherits its forward, becomes a `FusedSequential`.
- The class of any other module becomes a subclass of its own class, whose forward is the graph with
  the chains put together. Where a call is not what the graph was made from, the module says so and
  goes back to its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.package.importer import ObjMismatchError, ObjNotFoundError

from ._block import block_class
from ._chain import DROPOUT
from ._forwards import (
    Forward,
    changes_its_input,
    has_forward,
    is_sequential,
    memory_of,
    read_forwards,
    why_not_touched,
)
from ._fused import copies_itself, sequential_class
from ._links import Chain, Link, drops_paths, is_head, is_norm, link_of, place_of
from ._report import Conversion, qualified
from ._scaled import find_product


@dataclass
class Fusing:
    """What is to be changed for a model's chains; nothing is before all of it is known."""

    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    members: list[nn.Module] = field(default_factory=list)  # that have an implementation to choose


def plan(model: nn.Module, conversion: Conversion) -> Fusing:
    """Finds what can be fused and writes it down in `conversion`."""
    fusing = Fusing()
    names = {id(module): name for name, module in model.named_modules()}
    with_forward = [(name, m) for name, m in model.named_modules() if has_forward(m)]
    for name, module in with_forward:
        if is_sequential(module):
            _plan_sequential(module, name, fusing, conversion)
    blocks = [(name, module) for name, module in with_forward if not is_sequential(module)]
    forwards, failed = read_forwards(blocks, is_head)
    for name, module, reason in failed:
        text = f"its forward cannot be traced: it {reason}; its layers are converted one by one"
        conversion.apart.append((name, qualified(type(module)), text))
    for forward in forwards:
        _plan_block(forward, names, fusing, conversion)
    return fusing


def _note(
    conversion: Conversion, fusing: Fusing, name: str, parts: list[tuple[str, nn.Module | None]]
) -> None:
    """Writes a chain down: the BatchNorm's name in the model, and the parts by the forward's."""
    norm = parts[0][1]
    conversion.fused.append((name, " → ".join(text for text, _ in parts), qualified(type(norm))))
    for text, layer in parts:
        if layer is None:
            continue
        if is_head(layer) or place_of(layer) == DROPOUT:
            fusing.members.append(layer)
        if (reason := why_not_touched(layer)) is not None:
            why = f"{text} {reason}: while it has, it is called by itself"
            conversion.apart.append((name, qualified(type(norm)), why))


def _plan_sequential(module: nn.Module, name: str, fusing: Fusing, conversion: Conversion) -> None:
    layers = list(module._modules.items())
    found = []
    for i, (_, norm) in enumerate(layers):
        if not is_norm(norm):
            continue
        parts, before = [layers[i]], 0
        for key, layer in layers[i + 1 :]:
            place = place_of(layer)
            if place is None or 0 < place <= before:
                break
            if place:
                parts.append((key, layer))
                before = place
        if len(parts) > 1:
            found.append(parts)
    if not found:
        return
    reason = None
    if "forward" in vars(module):
        reason = "has a forward of its own on the object"
    elif copies_itself(type(module)):
        reason = "has a class that copies itself"
    if reason is not None:
        conversion.apart.append((name, qualified(type(module)), f"not fused: it {reason}"))
        return
    for parts in found:
        key = parts[0][0]
        _note(conversion, fusing, f"{name}.{key}" if name else key, parts)
    original: Any = type(module)
    fusing.classes.append((module, sequential_class(original)))


def _plan_block(
    forward: Forward,
    names: dict[int, str],
    fusing: Fusing,
    conversion: Conversion,
) -> None:
    taken: set[fx.Node] = set()
    for node, layer in forward.calls():
        if not is_head(layer):
            continue
        chain = Chain(node, layer, names[id(layer)], _links(forward, node, taken))
        if drops_paths(layer):
            _begin_branch(forward, chain)
        reason = _cut(forward, chain)
        if reason is not None:
            conversion.apart.append((chain.name, qualified(type(layer)), reason))
        if chain.links:
            forward.chains.append(chain)
            taken |= {link.node for link in chain.links}
    if not forward.chains:
        return
    reason = "not fused: its class copies itself" if copies_itself(type(forward.module)) else None
    if reason is None:
        try:
            fusing.classes.append((forward.module, block_class(forward)))
        except (ObjNotFoundError, ObjMismatchError):
            reason = "not fused: it calls what no import finds again"
    if reason is not None:
        conversion.apart.append((forward.name, qualified(type(forward.module)), reason))
        return
    for chain in forward.chains:
        _note(conversion, fusing, chain.name, chain.parts())


def _links(forward: Forward, node: fx.Node, taken: set[fx.Node]) -> list[Link]:
    """What follows a BatchNorm's call and is used by nothing else, in a chain's order. Where two
    chains meet in a sum, it is the first one's. A dropped branch has its sum and nothing more."""
    links: list[Link] = []
    place = 0
    of_a_branch = drops_paths(forward.layers[str(node.target)])
    while len(node.users) == 1:
        user = next(iter(node.users))
        link = None if user in taken else link_of(user, node, forward.layers)
        if link is None or (link.place and link.place <= place):
            break
        if of_a_branch:
            return [link] if link.residual is not None else []
        links.append(link)
        node, place = link.node, max(place, link.place)
    return links


def _begin_branch(forward: Forward, chain: Chain) -> None:
    """Puts the product with a layer scale before a dropped branch. Without one a sum in place is
    left as it is: a layer that drops nothing returns its input, which others may see."""
    if chain.links and _takes_one_input(chain.node):
        chain.product = find_product(chain.node, forward.layers)
    if chain.product is not None and _is_written_meanwhile(forward, chain):
        chain.product = None
    if chain.product is None and chain.links and chain.links[0].function[0] == "+=":
        chain.links.clear()


def _cut(forward: Forward, chain: Chain) -> str | None:
    """Shortens a chain to what may be fused; says why, where a reader might wonder."""
    chain.shorten(len(chain.links))
    if not chain.links:
        return None
    if not _takes_one_input(chain.node):
        chain.links.clear()
        return "not fused: it is called with more than its input"
    reason = None
    while chain.links and _is_written_meanwhile(forward, chain):
        link = chain.links[-1]
        chain.shorten(len(chain.links) - 1)
        reason = f"not fused with {link.text}: what it reads may be changed before that"
    return reason


def _takes_one_input(node: fx.Node) -> bool:
    given = node.args or tuple(node.kwargs.values())
    named = [*node.args, *node.kwargs]
    return len(named) == 1 and isinstance(given[0], fx.Node)


def _is_written_meanwhile(forward: Forward, chain: Chain) -> bool:
    """Whether what a chain reads may be changed between where it is read and where the chain ends,
    since from now on it is read there; or is read there after the chain has written over it."""
    layers = forward.layers
    reads = {chain.first: chain.first.all_input_nodes}
    reads |= {link.node: [link.residual] for link in chain.links if link.residual is not None}
    members = {chain.first, chain.node, *(link.node for link in chain.links)}
    # Of what may take the BatchNorm's place, an nn.Identity gives its input to what follows it.
    own = memory_of(chain.node.all_input_nodes[0], layers)
    shown = any(
        _is_of(chain.norm, n, layers) for n in forward.trace.graph.nodes if n.op == "get_attr"
    )
    node, written_late = chain.first, False
    waiting: set[object] = set()
    if chain.first.op == "call_module" and chain.product is not None:
        waiting.add("outside")  # the layer scale
    while node is not chain.links[-1].node:
        if node in reads:
            waiting.update(*(memory_of(n, layers) for n in reads[node]))
        if node in members:
            written_late |= node is not chain.node and changes_its_input(node, layers)
        else:
            if shown or _is_of(chain.norm, node, layers):
                return True  # its statistics are to be those that they were
            touched = set().union(*(memory_of(n, layers) for n in node.all_input_nodes))
            if touched & waiting and changes_its_input(node, layers):
                return True
            if written_late and touched & own:
                return True
        node = node.next
    return False


def _is_of(norm: nn.Module, node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Whether a node calls a BatchNorm, in another module perhaps, or reads a value of it."""
    if node.op == "call_module":
        return any(layer is norm for layer in layers[str(node.target)].modules())
    return node.op == "get_attr" and layers.get(str(node.target).rpartition(".")[0]) is norm
