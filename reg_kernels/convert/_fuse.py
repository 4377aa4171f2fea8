"""Fusing BatchNorm → (+ residual) → activation → Dropout, wherever a module's own forward has it.

Every module is read by itself, its layers as single calls, so that a chain lies in one forward and
each module other than the chain's layers goes on computing what it did, also when called alone.
The BatchNorm's object takes the whole chain on; what comes of the others depends on the forward:

- It runs one layer after the other (nn.Sequential, or a block that only does that). The forward
  stays; the activation and the dropout pass their input on.
- It adds a residual or calls functions. The module's class becomes a subclass of its own class,
  whose forward is the graph with the chains put together. Where a call is not what the graph was
  made from, the module says so and goes back to its own forward, its layers to their own work.

Either way a class changes and nothing else: objects, names and state stay.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from ..ops.batch_norm import SLOPE
from ._block import give_forward
from ._chain import ABSORBED, CHAINS
from ._forwards import Forward, Uses, changes_its_input, memory_of, read_forwards, why_not_touched
from ._layers import Conversion, qualified
from ._links import ABSORBABLE, ACTIVATION, DROPOUT, NORMS, RESIDUAL, Chain, Link, link_of


def fuse(model: nn.Module, backend: str | None, conversion: Conversion) -> None:
    """Fuses what can be fused in `model` itself and writes it down in `conversion`."""
    forwards, failed = read_forwards(model, lambda layer: type(layer) in NORMS)
    for name, module, reason in failed:
        text = f"its forward cannot be traced: it {reason}; its layers are converted one by one"
        conversion.apart.append((name, qualified(type(module)), text))
    uses = Uses(model, forwards)
    names = {id(module): name for name, module in model.named_modules()}
    for forward in forwards:
        for node, layer in forward.calls():
            if type(layer) in NORMS:
                chain = Chain(node, layer, names[id(layer)], _links(forward, node))
                reason = _cut(forward, chain, uses)
                if reason is not None:
                    conversion.apart.append((chain.name, qualified(type(layer)), reason))
                if chain.links:
                    forward.chains.append(chain)
    absorbed = _settle(forwards, uses, conversion)
    for forward in forwards:
        if not forward.chains:
            continue
        new_forward = not _can_stay(forward, absorbed)
        for chain in forward.chains:
            _join(chain, backend)
            conversion.fused.append((chain.name, chain.described(), qualified(type(chain.norm))))
        if new_forward:
            give_forward(forward)
    for layer in absorbed.values():
        layer.__class__ = ABSORBED[ABSORBABLE[type(layer)]]
        if backend is not None and isinstance(layer, nn.Dropout):
            layer.backend = backend


def _links(forward: Forward, node: fx.Node) -> list[Link]:
    """What follows a BatchNorm's call and is used by nothing else, in a chain's order."""
    links: list[Link] = []
    place = 0
    while len(node.users) == 1:
        link = link_of(next(iter(node.users)), node, forward.layers)
        if link is None or (link.place and link.place <= place):
            break
        links.append(link)
        node, place = link.node, max(place, link.place)
    return links


def _cut(forward: Forward, chain: Chain, uses: Uses) -> str | None:
    """Shortens a chain to what may be fused; says why, where a reader might wonder."""
    chain.shorten(len(chain.links))
    if not chain.links:
        return None
    reason = why_not_touched(chain.norm) or uses.why_not_once(chain.norm, forward)
    if reason is not None:
        chain.links.clear()
        return f"not fused: it {reason}"
    if not _takes_one_input(chain.node):
        chain.links.clear()
        return "not fused: it is called with more than its input"
    for i, link in enumerate(chain.links):
        if link.layer is not None and (reason := why_not_touched(link.layer)) is not None:
            chain.shorten(i)
            return f"not fused with {link.text}: that {reason}"
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
    since from now on it is read there."""
    layers = forward.layers
    reads = {chain.node: chain.node.all_input_nodes[0]}
    reads |= {link.node: link.residual for link in chain.links if link.residual is not None}
    members = {chain.node, *(link.node for link in chain.links)}
    node, waiting = chain.node, set()
    while node is not chain.links[-1].node:
        if node in reads:
            waiting |= memory_of(reads[node], layers)
        elif node not in members and changes_its_input(node, layers):
            written = set().union(*(memory_of(n, layers) for n in node.all_input_nodes))
            if written & waiting:
                return True
        node = node.next
    return False


def _settle(forwards: list[Forward], uses: Uses, conversion: Conversion) -> dict[int, nn.Module]:
    """Shortens the chains of forwards that stay as they are to layers that nothing else calls.

    Returns the layers, by id, that only the chains of one forward call, and that these therefore
    absorb. A chain that gets shorter may leave one to be called, so this goes on until all is
    settled.
    """
    while True:
        absorbed: dict[int, nn.Module] = {}
        for forward in forwards:
            layers = [k.layer for c in forward.chains for k in c.links if k.layer is not None]
            calls = Counter(map(id, layers))
            for layer in layers:
                if type(layer) in ABSORBABLE and uses.are_all(calls[id(layer)], layer, forward):
                    absorbed[id(layer)] = layer
        shortened = False
        for forward in forwards:
            if not forward.must_stay or _can_stay(forward, absorbed):
                continue
            for chain in forward.chains:
                kept = _that_stay(forward, chain, absorbed)
                if kept < len(chain.links):
                    text = f"not fused with {chain.links[kept].text}: "
                    text += (
                        "its forward depends on what a call may change"
                        if not forward.simple
                        else "that is not its alone, or no layer"
                    )
                    conversion.apart.append((chain.name, qualified(type(chain.norm)), text))
                    chain.shorten(kept)
                    shortened = True
            forward.chains = [chain for chain in forward.chains if chain.links]
        if not shortened:
            return absorbed


def _that_stay(forward: Forward, chain: Chain, absorbed: dict[int, nn.Module]) -> int:
    """How many links of a chain the BatchNorm can do at its own place, with the forward as it is:
    those that are layers and follow directly."""
    if not forward.simple:
        return 0
    node = chain.node
    for i, link in enumerate(chain.links):
        if link.node is not node.next or not (link.place == 0 or id(link.layer) in absorbed):
            return i
        node = link.node
    return len(chain.links)


def _can_stay(forward: Forward, absorbed: dict[int, nn.Module]) -> bool:
    return all(_that_stay(forward, chain, absorbed) == len(chain.links) for chain in forward.chains)


def _join(chain: Chain, backend: str | None) -> None:
    """Makes the BatchNorm's object one that does the chain."""
    norm, state = chain.norm, vars(chain.norm)
    norm.__class__ = CHAINS[NORMS[type(norm)]]
    if backend is not None:
        norm.backend = backend
    state["activation"] = None
    state["negative_slope"] = SLOPE
    for link in chain.links:
        if link.place == RESIDUAL:
            state["_adds_in_place"] = link.in_place
        elif link.place == ACTIVATION:
            state["activation"], state["negative_slope"] = link.activation, link.slope
        elif link.place == DROPOUT and link.layer is not None:
            state["_dropout"] = (link.layer,)
