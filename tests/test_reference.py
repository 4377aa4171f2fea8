"""The reference: what the docstring of each public name has to say, and that it says it."""

import enum
import importlib
import inspect
import re

import pytest
from torch import nn, optim

from reg_kernels.augment import Cutout, Mixup
from reg_kernels.augment._transform import Transform
from reg_kernels.convert import Conversion
from reg_kernels.convert._fold import Folding

# How it is seen that a docstring says something. A formula may be that of a function that is named
# (`computes`), and a source a function of torch or torchvision.
SAYS = {
    "shapes": r"\((\.\.\.|[A-Z]), ?[^()]*\)|any shape",
    "arguments": r"^Args:",
    "result": r"^Returns:",
    "errors": r"^Raises:",
    "source": r"^Source: |`torch\.(nn|optim)\.\w+`",
    "attributes": r"^(Attributes|Args):",
}
NO_FORMULA = r"(Args|Raises|Returns|Columns|Source|Shape|Example|A call raises)\b"
# What the docstring of a name has to say, by the kind of the name.
KINDS = {
    "op": ("formula", "shapes", "arguments", "result", "errors", "source"),
    "layer": ("formula", "shapes", "arguments", "errors", "source"),
    "mixing or attack": ("formula", "shapes", "arguments", "errors", "source"),
    "optimizer": ("formula", "arguments", "errors", "source"),  # of tensors of any shape
    # The shapes that all have in common are Pipeline's.
    "transform": ("formula", "arguments", "errors", "source"),
    "transform of shapes": ("formula", "shapes", "arguments", "errors", "source"),
    "function": ("arguments", "errors"),
    "object": ("arguments", "errors"),
    "record": ("attributes",),
    "error": (),  # its first sentence says when it is raised
    "words": (),  # each member says what it means
}
# Names that lack a part, and why.
EXEMPT = {
    ("distributed.unshard", "errors"): "raises none of its own",
    ("distributed.parameters_of", "errors"): "raises none of its own",
    ("distributed.whole", "errors"): "raises none",
    ("export.decompositions", "errors"): "raises none",
    ("backends.why_not", "errors"): "raises none: it returns the reason",
}
MODULES = ("", ".functional", ".nn", ".optim", ".augment", ".adversarial", ".training")
MODULES += (".distributed", ".export", ".integrations.timm", ".backends")
if importlib.util.find_spec("lightning"):
    MODULES += (".integrations.lightning",)
# Arguments of the transforms that change shapes.
RESHAPES = {"num_output_channels", "size", "padding", "expand"}
OTHERS = {".integrations.timm": ["register"], ".backends": ["choose", "why_not"]}
# Methods without a docstring, or whose class says what they do.
HOOKS = {
    "forward": "the class says how a layer is called",
    "__call__": "the class says how an object is called",
    "extra_repr": "what torch prints",
    "right_inverse": "what torch's parametrizations call",
    **dict.fromkeys(("draw", "write", "needed_words", "for_evaluation"), "what a Pipeline calls"),
}


def public():
    for part in MODULES:
        module = importlib.import_module(f"reg_kernels{part}")
        for name in OTHERS.get(part) or module.__all__:
            thing = getattr(module, name)
            if callable(thing):  # no module, and no constant: those stand in docs/reference
                yield f"{part}.{name}".strip("."), thing
    yield "convert.Conversion", Conversion
    yield "fold.Folding", Folding


PUBLIC = dict(public())


def kind_of(name, thing):
    if not inspect.isclass(thing):
        kinds = {"functional": "op", "adversarial": "mixing or attack"}
        return kinds.get(name.partition(".")[0], "function")
    if issubclass(thing, Exception):
        return "error"
    if issubclass(thing, enum.Enum):
        return "words"
    if issubclass(thing, Transform) and not issubclass(thing, Cutout):  # its size is no image's
        changes = RESHAPES & set(inspect.signature(thing).parameters)
        return "transform of shapes" if changes else "transform"
    known = {Transform: "transform", nn.Module: "layer", optim.Optimizer: "optimizer"}
    for base, kind in known.items():
        if issubclass(thing, base):
            return kind
    if name in ("augment.Params", "augment.MixedTarget", "training.Conflict", "training.Method"):
        return "record"
    if thing in (Conversion, Folding):
        return "record"
    is_mixing = name.startswith("adversarial.") or issubclass(thing, Mixup)
    return "mixing or attack" if is_mixing else "object"


def computes(name, text):
    """Whether a docstring has a formula, or names what computes the same and has one itself. What
    it says of arguments and errors does not count, nor its source, unless a transform is
    torchvision's of this name."""
    if name.startswith("augment."):
        theirs = rf"`torchvision\.transforms\.v2\.{name.rpartition('.')[2]}`"
        if re.search(theirs, text):
            return True
    parts = [p for p in text.split("\n\n") if not re.match(NO_FORMULA, p)]
    said = re.sub(r"\s+", " ", "\n\n".join(parts))
    if re.search(r":math:|\.\. math::|`torch\.(nn|optim)\.\w+`", said):
        return True
    named = [f"functional.{other}" for other in re.findall(r"`(?:\w+\.)?functional\.(\w+)`", said)]
    if name.startswith("augment."):
        named += [f"augment.{other}" for other in re.findall(r"`(\w+)`", said)]
    others = (PUBLIC[other] for other in named if other in PUBLIC and other != name)
    return any(re.search(":math:", inspect.getdoc(other)) for other in others)


def told(name):
    """What a docstring says: by itself, or by "... are those of `another`", which says it."""
    text = inspect.getdoc(PUBLIC[name])
    found = {part for part, pattern in SAYS.items() if re.search(pattern, text, re.M)}
    found |= {"formula"} if computes(name, text) else set()
    for parts, other in re.findall(r"([\w,\s]+?)\s+are\s+those\s+of\s+`(\w+)`", text):
        of = f"{name.rpartition('.')[0]}.{other}".strip(".")
        if of in PUBLIC:
            found |= told(of) & set(re.findall(r"\w+", parts.lower().replace("argument ", "")))
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_says(name):
    needed = KINDS[kind_of(name, PUBLIC[name])]
    if "arguments" in needed and not inspect.signature(PUBLIC[name]).parameters:
        needed = [part for part in needed if part != "arguments"]
    lacks = [part for part in needed if part not in told(name) and (name, part) not in EXEMPT]
    assert not lacks, f"{name} does not say its {', '.join(lacks)}"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_names_every_parameter(name):
    text = inspect.getdoc(PUBLIC[name])
    if re.search(r"[Aa]rguments[\w,\s]* are\s+those\s+of", text):
        return
    if kind_of(name, PUBLIC[name]) in ("words", "error", "record"):
        return
    listed = re.findall(r"^    ([\w, ]+): ", text, re.M)
    names = {each for line in listed for each in re.findall(r"\w+", line)}
    assert set(inspect.signature(PUBLIC[name]).parameters) - {"self"} <= names


@pytest.mark.parametrize("name", [n for n, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_public_methods_are_documented(name):
    for method, value in vars(PUBLIC[name]).items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if inspect.isfunction(function) and method[0] != "_" and method not in HOOKS:
            # What a base of another package documents says what its override does.
            text = inspect.getdoc(getattr(PUBLIC[name], method))
            assert text, f"{name}.{method}"
            kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            taken = inspect.signature(function).parameters.values()
            names = {p.name for p in taken if p.kind not in kinds} - {"self", "cls"}
            assert names <= {*re.findall(r"\w+", text)}, f"{name}.{method}"


def test_every_exemption_is_needed():
    for name, part in EXEMPT:
        assert name not in PUBLIC or part not in told(name), (name, part)
