"""Reading a module's own forward as a torch.fx graph, or the reason why it cannot be read.

fx runs the forward once and keeps what happened to the tensors; whatever Python decided on the way
is lost. A graph is trusted here only if none of that can come out differently at another call:
what a call may change is either refused or handed out beside the graph, to be compared at a call.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode


class CannotTrace(Exception):
    """Why a forward has no graph; the text completes "forward cannot be traced: it ..."."""


@dataclass
class Trace:
    """A forward: every child is one call, and what depends on `training` reads it."""

    graph: fx.Graph
    required: list[str]  # arguments; the graph holds where none of them is None
    optional: dict[str, Any]  # the other arguments, which must have these defaults
    fixed: dict[str, Any]  # attributes of the module ("layers.0.stride"): as they must be


# x += y on values that are traced: fx itself would record x + y, which leaves x's other names with
# the old value. As functions, because fx prints operator.iadd as the statement, and that rebinds a
# name where x is a number.
_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


def _in_place_function(name: str) -> Callable[[Any, Any], Any]:
    compute = getattr(operator, name)

    def function(a: Any, b: Any) -> Any:
        return compute(a, b)

    function.__name__ = function.__qualname__ = name
    return function


in_place_functions = {name: _in_place_function(name) for name in _IN_PLACE}
globals().update(in_place_functions)  # generated code imports them from here


class _InPlace:
    """What fx's traced values lack: in-place operators, and a refusal to take attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):  # fx's own
            raise CannotTrace(f"sets {name} of a tensor")
        object.__setattr__(self, name, value)


class _Proxy(_InPlace, fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(_InPlace, fx.proxy.Attribute):
    pass


for _name, _function in in_place_functions.items():

    def _record(self: Any, other: Any, function: Callable[..., Any] = _function) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_InPlace, f"__{_name}__", _record)


_PLAIN: tuple[type, ...] = (
    type(None),
    bool,
    int,
    float,
    str,
    torch.dtype,
    type,
    types.FunctionType,
)
_PLAIN += (types.BuiltinFunctionType,)


def _is_plain(value: object) -> bool:
    """Whether a value is one that cannot change inside and that == compares."""
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return isinstance(value, _PLAIN)


@dataclass
class _Watch:
    """What a forward reads and does beside computing on its arguments, while it is traced."""

    module: nn.Module
    fixed: dict[str, Any] = field(default_factory=dict)
    reads_training: set[str] = field(default_factory=set)
    problem: str | None = None

    def refuse(self, problem: str) -> CannotTrace:
        # Kept, since the forward may catch what is raised in it.
        self.problem = self.problem or problem
        return CannotTrace(problem)


def _modes() -> tuple[object, ...]:
    """What a `with` block inside a forward may change, and a graph does not hold."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch, self._modes = watch, _modes()
        self.required: list[str] = []
        self.optional: dict[str, Any] = {}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise self._watch.refuse("switches gradients, autocast or saved-tensor hooks inside")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self._watch.refuse("branches on the values of a tensor")

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # fx would take an argument that is left out for one that is given.
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for parameter in parameters:
            name, named = parameter.name, (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if parameter.default is not parameter.empty and parameter.kind in named:
                if not _is_plain(parameter.default):
                    raise CannotTrace(f"has a default of {name} that cannot be compared")
                self.optional[name] = parameter.default
            elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                self.required.append(name)
            else:
                raise CannotTrace(f"takes {parameter}")
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.required]
        return root_fn, [self.root, *proxies]


_OF_EVERY_MODULE = {*vars(nn.Module()), "training"}


class _NoTensorsOfItsOwn(TorchDispatchMode):
    """Refuses what is computed while tracing: its value would be a constant of the graph."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise self._watch.refuse(f"computes on tensors that no argument brought ({func})")


_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_PYTHON = str(Path(inspect.__file__).parent)


_COMPILED = (torch.jit.ScriptModule, fx.GraphModule)


def _is_a_users(file: str) -> bool:
    """Whether code is a model's, and not of what traces it."""
    if file.startswith((_TORCH, _HERE, "<frozen")):
        return False
    return "site-packages" in file or not file.startswith(_PYTHON)


# Of a traced value, or of the moment: the answers are another call's. What is printed is, too.
_QUESTIONS = {"isinstance", "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"}
_QUESTIONS |= {"print"}


@contextlib.contextmanager
def _no_questions(watch: _Watch) -> Iterator[None]:
    """Notices what asks for a value's type or for a mode. fx has no hook for that."""

    def profile(frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__name__", "") in _QUESTIONS:
            file = frame.f_code.co_filename
            if _is_a_users(file):
                watch.refuse(
                    f"calls {called.__name__} (line {frame.f_lineno} of {Path(file).name})"
                )

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(previous)


@contextlib.contextmanager
def _attributes(watch: _Watch) -> Iterator[None]:
    """Notes the plain attributes that are read of the module and its layers; refuses writes."""
    names = {id(module): name for name, module in watch.module.named_modules()}
    get, set_, delete = object.__getattribute__, nn.Module.__setattr__, nn.Module.__delattr__

    def read(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        if name.startswith("__") or id(module) not in names:
            return value
        if isinstance(module, _COMPILED) and not _is_a_users(sys._getframe(1).f_code.co_filename):
            return value  # what a call of it takes, which is one call here
        path = names[id(module)]
        path = f"{path}.{name}" if path else name
        if name == "training":
            watch.reads_training.add(path)
        elif name not in _OF_EVERY_MODULE and not isinstance(value, types.MethodType):
            if isinstance(getattr(type(module), name, None), property):
                return value  # what it reads itself is noted
            if not _is_plain(value):
                raise watch.refuse(
                    f"reads the attribute {path}, of {type(value).__name__}, which may change"
                )
            watch.fixed[path] = value
        return value

    def write(module: nn.Module, name: str, *value: Any) -> None:
        if id(module) in names:
            raise watch.refuse(f"changes the attribute {name}")
        (set_ if value else delete)(module, name, *value)

    # The class's own, not an instance's: a layer's attributes may be read as well.
    cls: Any = nn.Module
    cls.__getattribute__ = read
    cls.__setattr__ = cls.__delattr__ = write
    try:
        yield
    finally:
        del cls.__getattribute__
        cls.__setattr__, cls.__delattr__ = set_, delete


@contextlib.contextmanager
def _all_training(module: nn.Module, training: bool) -> Iterator[None]:
    # Those of TorchScript have the flag elsewhere.
    before = [(m, m.training) for m in module.modules() if "training" in m.__dict__]
    for m, _ in before:
        m.__dict__["training"] = training
    try:
        yield
    finally:
        for m, flag in before:
            m.__dict__["training"] = flag


@contextlib.contextmanager
def _no_draws(watch: _Watch) -> Iterator[None]:
    """Notices what draws from the generators outside torch, and turns them back."""
    numpy = sys.modules.get("numpy")  # which torch has loaded where it is installed
    before, numpy_before = random.getstate(), numpy and numpy.random.get_state()
    yield
    if random.getstate() != before or (numpy and _differ(numpy.random.get_state(), numpy_before)):
        random.setstate(before)
        if numpy:
            numpy.random.set_state(numpy_before)
        watch.refuse("draws random numbers")


def _differ(state: Any, before: Any) -> bool:
    """Whether two states of numpy's generator do."""
    (_, key, *rest), (_, key_before, *rest_before) = state, before
    return key.tobytes() != key_before.tobytes() or rest != rest_before


def _run(module: nn.Module, training: bool) -> tuple[_Tracer, _Watch]:
    watch = _Watch(module)
    tracer = _Tracer(watch)
    with _no_draws(watch):
        _trace_into(tracer, watch, training)
    if watch.problem is not None:
        raise CannotTrace(watch.problem)
    return tracer, watch


def _trace_into(tracer: _Tracer, watch: _Watch, training: bool) -> None:
    """Traces; what goes wrong is in `watch.problem` then."""
    module = watch.module
    try:
        with (
            _all_training(module, training),
            _attributes(watch),
            _no_questions(watch),
            _NoTensorsOfItsOwn(watch),
        ):
            tracer.trace(module)
    except CannotTrace as error:
        watch.refuse(str(error))
    except Exception as error:  # whatever a forward may raise on values that have no numbers
        text = (str(error).splitlines() or [""])[0]
        watch.refuse(f"raises {type(error).__name__}: {text}")


def trace(module: nn.Module, evaluation_only: bool = False) -> Trace:
    """The graph of a module's forward, in which each layer is one call and nothing is inlined.

    With `evaluation_only` it is the graph of evaluation, which training need not follow. Neither
    the module nor a random generator is changed. `torch.fx` replaces functions of nn.Module while
    it traces, so no other thread may use a module at that time.

    Raises:
        CannotTrace: it branches on a value; computes on tensors of its own, draws random numbers
            included; sets an attribute, or reads one that may change unseen; asks for types or
            prints; has torch.no_grad, autocast or checkpointing inside; or does, in training, what
            it does not in evaluation, other than passing the flag on.
    """
    if "forward" in vars(module):
        raise CannotTrace("was replaced on this object")
    evaluation, watched = _run(module, False)
    training, watched_training = (evaluation, watched) if evaluation_only else _run(module, True)
    reads_training = watched.reads_training | watched_training.reads_training
    _unite(training.graph, evaluation.graph, only_its_own=reads_training == {"training"})
    for node in training.graph.nodes:
        node.type = None  # annotations, which would have to be imported
    fixed = watched.fixed | watched_training.fixed
    return Trace(training.graph, training.required, training.optional, fixed)


def _unite(graph: fx.Graph, evaluation: fx.Graph, only_its_own: bool) -> None:
    """Makes the graph of training that of both, by reading the flag where they differ in it."""
    branches = CannotTrace("does something else in training than in evaluation")
    nodes, others = list(graph.nodes), list(evaluation.nodes)
    if len(nodes) != len(others):
        raise branches

    for node, other in zip(nodes, others, strict=True):
        flag: list[fx.Node] = []

        def merge(a: Any, b: Any, node: fx.Node = node, flag: list[fx.Node] = flag) -> Any:
            if a is True and b is False:
                if not only_its_own:
                    raise CannotTrace("reads the training flag of a layer")
                if not flag:
                    with graph.inserting_before(node):
                        flag.append(graph.get_attr("training"))
                return flag[0]
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.name == b.name:
                return a
            if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
                return type(a)(merge(x, y) for x, y in zip(a, b, strict=True))
            if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
                return {key: merge(a[key], b[key]) for key in a}
            if isinstance(a, slice) and isinstance(b, slice):
                return slice(*map(merge, _parts(a), _parts(b)))
            if type(a) is type(b) and a == b:
                return a
            raise branches

        if (node.op, node.target, node.name) != (other.op, other.target, other.name):
            raise branches
        node.args, node.kwargs = merge(node.args, other.args), merge(node.kwargs, other.kwargs)


def _parts(s: slice) -> tuple[Any, Any, Any]:
    return s.start, s.stop, s.step
