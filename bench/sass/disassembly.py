"""Reads what nvdisasm prints: instructions, the flow between them, loops, and the hot path of each.

A kernel has paths that large aligned inputs never take: odd ends, element by element. So one path
is counted: through a loop's body, or through the kernel where no loop touches global memory. It is
the path with most of the widest loads and stores, and the shortest of those. Options that cost no
such access, like an activation or a slow division, are therefore off. An inner loop that touches no
global memory is on the path once, since the code does not say how often it runs; `inner_loops` says
how many such loops there are.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

CLASSES = ("integer", "float", "conversion", "memory", "control")
_LOADS = ("LDG", "LD", "LDGSTS")
_STORES = ("STG", "ST")
_GLOBAL = frozenset(_LOADS + _STORES)
_MEMORY = (*_LOADS, *_STORES, "LDS", "STS", "LDSM", "LDL", "STL", "LDC", "LDCU", "ULDC", "SHFL")
_MEMORY += ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "LDGDEPBAR", "DEPBAR", "CCTL", "MEMBAR")
_CONVERSION = ("F2F", "F2I", "I2F", "F2FP", "I2FP", "FRND", "I2I")
_HALF = ("HADD2", "HMUL2", "HFMA2", "HSETP2", "HMNMX2", "HSET2")
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
_FLOAT = ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FSET", "FMNMX", "FMNMX3", "FCHK", "MUFU")
_CONTROL = ("BRA", "BRX", "BRXU", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "BAR")
_CONTROL += ("NOP", "WARPSYNC", "YIELD", "NANOSLEEP", "LEPC", "ENDCOLLECTIVE", "ERRBAR", "BPT")
_CONTROL += ("CGAERRBAR", "S2R", "S2UR", "VOTE", "VOTEU", "PREEXIT", "ACQBULK", "KILL")

_FUNCTION = re.compile(r"^\.text\.([\w$.]+):")
_LABEL = re.compile(r"^(\.L\w+):")
_CODE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*([^;]*);"
)
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Instruction:
    name: str  # without modifiers
    modifiers: tuple[str, ...]
    predicated: bool
    operands: str
    aside: bool = False  # it accesses something other than elements: an index, a label

    @property
    def width(self) -> int:
        """Bytes of a thread's global load or store of elements; 0 of anything else."""
        if self.name not in _GLOBAL or self.aside:
            return 0
        for modifier in reversed(self.modifiers):
            if modifier in ("256", "128", "64"):
                return int(modifier) // 8
            if modifier in ("U16", "S16", "U8", "S8"):
                return int(modifier[1:]) // 8
        return 4

    @property
    def loads(self) -> bool:
        return self.name in _LOADS

    @property
    def kind(self) -> str:
        """One of CLASSES; an instruction in no list moves or computes integers."""
        for names, kind in (
            (_MEMORY, "memory"),
            (_CONVERSION, "conversion"),
            (_FLOAT + _HALF + _DOUBLE, "float"),
            (_CONTROL, "control"),
        ):
            if self.name in names:
                return kind
        return "integer"

    @property
    def pipe(self) -> str:
        """The units that execute it, as gpus.RATES names them; "issue" where none is a limit."""
        if self.name in ("SHFL", "LDS", "STS", *_LOADS, *_STORES):
            return "lsu"
        if self.name in _DOUBLE:
            return "fp64"
        if self.name == "MUFU":
            return "mufu"
        if self.name in _CONVERSION:
            # Packing two floats, and integers to floats, are arithmetic of 32 bits.
            return "alu" if self.name in ("F2FP", "I2FP") else "conversion"
        if self.name in ("FADD", "FMUL", "FFMA", *_HALF):
            return "fp32"
        if self.name == "IMAD":
            return "imad"
        if self.kind in ("integer", "float") and not self.name.startswith("U"):
            return "alu"
        return "issue"


@dataclass
class Block:
    """Instructions that are entered at the first and left after the last."""

    code: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @functools.cached_property
    def accesses(self) -> list[Instruction]:
        """The accesses to elements in global memory."""
        return [code for code in self.code if code.width]


@dataclass(frozen=True)
class Hot:
    """What one trip of a thread does on the hot path of a loop, or of a kernel without one."""

    loop: bool
    inner_loops: int
    accesses: tuple[tuple[str, int, int], ...]  # ("load" or "store", bytes, count), sorted
    streamed: tuple[tuple[str, int, int], ...]  # the accesses that stand for DRAM traffic
    kinds: dict[str, int]  # instructions by class
    pipes: dict[str, int]  # instructions by the units that execute them

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    @property
    def widest(self) -> int:
        return max((width for _, width, _ in self.streamed), default=0)

    @property
    def squares(self) -> int:
        return sum(width**2 * count for _, width, count in self.streamed)

    def moved(self, kind: str) -> int:
        """The bytes that the streamed loads, or stores, move."""
        return sum(width * count for k, width, count in self.streamed if k == kind)

    @property
    def bytes(self) -> int:
        return self.moved("load") + self.moved("store")


def functions(text: str) -> Iterator[tuple[str, list[tuple[str, Instruction | None]]]]:
    """(mangled name, [(label, None) or ("", instruction)]) of each function in a listing."""
    name, lines = None, []
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            if name is not None:
                yield name, lines
            name, lines = match[1], []
        elif name is None:
            continue
        elif line.startswith("\t.section"):
            yield name, lines
            name, lines = None, []
        elif match := _LABEL.match(line):
            lines.append((match[1], None))
        elif match := _CODE.match(line):
            guard, word, modifiers, operands = match.groups()
            code = Instruction(word, tuple(modifiers.split(".")[1:]), guard is not None, operands)
            lines.append(("", code))
    if name is not None:
        yield name, lines


def elements_alone(
    lines: list[tuple[str, Instruction | None]], widths: frozenset[int]
) -> list[tuple[str, Instruction | None]]:
    """`lines`, where an access whose width is none of an element's is only an instruction. So an
    int64 label is not taken for two floats: every kernel here loads at least four at once."""
    return [
        (label, replace(code, aside=True) if code and code.width not in (0, *widths) else code)
        for label, code in lines
    ]


def _jumps(code: Instruction) -> bool:
    return code.name in ("BRA", "BRX", "BRXU", "JMP")


def _conditional(code: Instruction) -> bool:
    """Whether the instruction behind a branch or an exit can be next."""
    before_target = code.operands.split("`")[0]
    return code.predicated or (code.name == "BRA" and bool(before_target.strip(" ,")))


def blocks_of(lines: list[tuple[str, Instruction | None]]) -> list[Block]:
    """The blocks of a function, the entry first, and where each can go on.

    The targets of an indirect branch (BRX) are in a table that is not printed: they are the labels
    that nothing else names.
    """
    blocks, labels, pending = [Block()], {}, []
    for label, code in lines:
        if code is None:
            if blocks[-1].code:
                blocks.append(Block())
            labels[label] = len(blocks) - 1
            continue
        blocks[-1].code.append(code)
        if _jumps(code) or code.name in ("EXIT", "RET"):
            pending.append((len(blocks) - 1, code))
            blocks.append(Block())
    named = {_TARGET.search(c.operands)[1] for _, c in pending if _TARGET.search(c.operands)}
    named |= {
        match[1]
        for _, code in lines
        if code and code.name in ("BSSY", "CALL", "WARPSYNC")
        for match in [_TARGET.search(code.operands)]
        if match
    }
    tabled = [index for label, index in labels.items() if label not in named]
    ends = dict(pending)
    for index, block in enumerate(blocks):
        code = ends.get(index)
        if (code is None or _conditional(code)) and index + 1 < len(blocks):
            block.next.append(index + 1)
        if code is not None and _jumps(code):
            match = _TARGET.search(code.operands)
            block.next += [labels[match[1]]] if match and match[1] in labels else []
            block.next += [] if match else tabled
    return blocks


def _flow(blocks: list[Block]) -> tuple[list[int], dict[int, set[int]]]:
    """Returns the reachable blocks, each before those that follow it, and the body of each loop by
    its head."""
    order, state, back = [], {0: 1}, []
    stack = [(0, iter(blocks[0].next))]
    while stack:
        index, following = stack[-1]
        for successor in following:
            if state.get(successor) is None:
                state[successor] = 1
                stack.append((successor, iter(blocks[successor].next)))
                break
            if state[successor] == 1:  # on the way here: a loop
                back.append((index, successor))
        else:
            state[index] = 2
            order.append(index)
            stack.pop()
    before: dict[int, list[int]] = {}
    for index in order:
        for successor in blocks[index].next:
            before.setdefault(successor, []).append(index)
    loops: dict[int, set[int]] = {}
    for tail, head in back:
        body, waiting = loops.setdefault(head, {head}), [tail]
        while waiting:
            index = waiting.pop()
            if index not in body:
                body.add(index)
                waiting += before.get(index, [])
    return order[::-1], loops


def hot_paths(lines: list[tuple[str, Instruction | None]]) -> list[Hot]:
    """The hot paths of a function; none where nothing touches global memory.

    They are those of the innermost loops that touch it, but only of the wide ones: a loop whose sum
    of squared widths is less than half of the greatest takes odd ends. The code around those loops,
    or the function where there is no loop, is the hot path instead if its sum is at least twice
    theirs and its accesses are no narrower.
    """
    blocks = blocks_of(lines)
    order, loops = _flow(blocks)
    touching = {h: body for h, body in loops.items() if any(blocks[i].accesses for i in body)}
    innermost, around = [], []
    for head, body in touching.items():
        nested = [b for h, b in touching.items() if h != head and b < body]
        own = body - set().union(*nested)
        quiet = sum(1 for h, b in loops.items() if h not in touching and b < body)
        hot = _hot(_best_path(blocks, order, head, body, own), quiet, True)
        (around if nested else innermost).append(hot)
    outside = set(order) - set().union(*touching.values())
    quiet = sum(1 for head in loops if head not in touching)
    around.append(_hot(_best_path(blocks, order, 0, set(order), outside), quiet, False))
    widest = max((hot.squares for hot in innermost), default=0)
    outer = max(around, key=lambda hot: hot.squares)
    vectors = max((hot.widest for hot in innermost), default=0)
    if outer.squares >= max(2 * widest, 1) and outer.widest >= vectors:
        return [outer]
    return [hot for hot in innermost if 2 * hot.squares >= widest > 0]


def _best_path(
    blocks: list[Block],
    order: list[int],
    head: int,
    body: set[int],
    own: set[int],
) -> list[Instruction]:
    """The instructions of `own` on the best path from `head`: most of the widest accesses."""
    accesses = [code for index in own for code in blocks[index].accesses]
    widest = {k: max((c.width for c in accesses if c.loads == k), default=0) for k in (True, False)}
    best: dict[int, tuple[int, int, int | None]] = {}
    for index in reversed([i for i in order if i in body]):
        code = blocks[index].code
        ways: list[tuple[int, int, int | None]] = [
            (*best[successor][:2], successor)
            for successor in blocks[index].next
            if successor in best and successor != head
        ]
        # A trip ends by going back to the head, the kernel by leaving.
        ends = code and code[-1].name in ("EXIT", "RET") and not head
        if ends or head in blocks[index].next:
            ways.append((0, 0, None))
        if not ways:
            continue
        worth, short, following = max(ways, key=lambda way: way[:2])
        if index in own:
            worth += sum(c.width**2 for c in blocks[index].accesses if c.width == widest[c.loads])
            short -= len(code)
        best[index] = (worth, short, following)
    path, at = [], head if head in best else None
    while at is not None:
        path += blocks[at].code if at in own else []
        at = best[at][2]
    return path


def _hot(path: list[Instruction], inner_loops: int, loop: bool) -> Hot:
    path = [code for code in path if code.name != "NOP"]
    accesses = [code for code in path if code.width]
    widest = {k: max((c.width for c in accesses if c.loads == k), default=0) for k in (True, False)}
    counts = Counter((c.loads, c.width) for c in accesses if not c.predicated)
    # A channel's parameters, an index or a row's target hit caches; such accesses are narrower than
    # the widest. Half as wide and at least as many are streamed too: those of an array of shorter
    # elements beside another.
    streamed = [
        c
        for c in accesses
        if c.width == widest[c.loads]
        or (
            2 * c.width == widest[c.loads]
            and not c.predicated
            and counts[c.loads, c.width] >= counts[c.loads, widest[c.loads]]
        )
    ]
    kinds, pipes = Counter(c.kind for c in path), Counter(c.pipe for c in path)
    return Hot(
        loop,
        inner_loops,
        _tally(accesses),
        _tally(streamed),
        {kind: kinds[kind] for kind in CLASSES},
        dict(sorted(pipes.items())),
    )


def _tally(codes: list[Instruction]) -> tuple[tuple[str, int, int], ...]:
    counts = Counter(("load" if code.loads else "store", code.width) for code in codes)
    return tuple(sorted((kind, width, count) for (kind, width), count in counts.items()))


def widths(lines: list[tuple[str, Instruction | None]]) -> dict[str, dict[str, int]]:
    """How many global loads and stores of each width, in bytes, a function has."""
    result: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    for _, code in lines:
        if code and code.width:
            result["load" if code.loads else "store"][str(code.width)] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in result.items()}
