"""Models without some of their residual branches.

A branch without channels adds the same constant at every position of every image to the path around it, so its layers
need not run: the block around it is traced with torch.fx, the constant becomes a parameter, and layers on which nothing
depends any more are deleted.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UsageError
from ..introspect.modes import kept_modes

_MARK = "robust_prune_branches"
_CONSTANT = "branch_constant"
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        block: qualified name of the module in which the branch leaves the path around it and is added to it.
        readers: names within the block of the layers that read the branch's channels.
        channels: channels of the branch's result.
        dims: number of dimensions of this result.
        dim: which of them is that of the channels.
    """

    block: str
    readers: tuple[str, ...]
    channels: int
    dims: int
    dim: int


@dataclass(frozen=True)
class _Taken:
    """A branch that was taken out, its constant's name, and the attributes of the modules whose code was traced."""

    branch: Branch
    constant: str
    attributes: Mapping[str, Mapping[str, Any]]


class NotABranchError(Exception):
    """The layers do not form a residual branch; the message says why."""


def take_out(model: nn.Module, branch: Branch, value: Tensor | None = None) -> None:
    """Take a branch out of `model`, in place.

    Args:
        model: the model; other branches may have been taken out before.
        branch: the branch.
        value: the constant that takes its place, [channels]; zero by default.

    Raises:
        UsageError: the model has no such block, or the block no such branch.
    """
    owner, _, name = branch.block.rpartition(".")
    try:
        block = model.get_submodule(branch.block)
        setattr(model.get_submodule(owner), name, without(block, branch, value))
    except (AttributeError, NotABranchError) as error:
        raise UsageError(
            f"the branch that {', '.join(branch.readers)} of {branch.block!r} reads cannot be taken out: {error}. "
            "Check the architecture and the versions of the packages that build it."
        ) from error


def without(block: nn.Module, branch: Branch, value: Tensor | None = None) -> fx.GraphModule:
    """Return a block without one of its branches; it shares the remaining layers with `block`. See `take_out`.

    Raises:
        NotABranchError: the block cannot be traced, or the layers do not form a residual branch in it.
    """
    like = next((p for p in block.parameters() if p.is_floating_point()), nn.Parameter(torch.empty(0)))
    constant = torch.zeros(branch.channels) if value is None else value.detach()
    name = next(n for n in _numbered(_CONSTANT) if not hasattr(block, n))
    parameter = nn.Parameter(constant.to(like.device, like.dtype, copy=True), like.requires_grad)
    small = _Trace(block, branch.readers).rest(branch, name, parameter)
    if _Trace(block, branch.readers, training=True).rest(branch, name, parameter).code != small.code:
        raise NotABranchError("what its code does around the branch depends on the mode, which tracing would fix")
    small.training = block.training
    for hooks in _HOOKS:
        setattr(small, hooks, getattr(block, hooks))
    return _marked(small, (*_marks(block), _Taken(branch, name, _attributes(block, branch))))


def result_of(block: nn.Module, readers: Collection[str]) -> fx.GraphModule:
    """Return a module that maps the inputs of a block to the result of the branch that `readers` end.

    Raises:
        NotABranchError: the block cannot be traced, or the layers do not form a residual branch in it.
    """
    return _Trace(block, readers).result()


def taken_out(model: nn.Module) -> dict[str, Branch]:
    """Return the branches that were taken out of a model, by the names of the parameters in their places.

    Those of a block are in the order in which they were taken out.
    """
    return {f"{t.branch.block}.{t.constant}": t.branch for module in model.modules() for t in _marks(module)}


def traced_attributes(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """Return the plain attributes of each module whose code became part of a traced block, by qualified name."""
    found: dict[str, Mapping[str, Any]] = {}
    for module in model.modules():
        for taken in _marks(module):
            found = {**taken.attributes, **found}  # tracing again sees what is left of a module
    return found


def _marks(module: nn.Module) -> tuple[_Taken, ...]:
    return tuple(module.meta.get(_MARK, ())) if isinstance(module, fx.GraphModule) else ()


def _attributes(block: nn.Module, branch: Branch) -> dict[str, dict[str, Any]]:
    found = {}
    for name, module in block.named_modules():
        if not _is_leaf(name, branch.readers) and not isinstance(module, fx.GraphModule):
            plain = {k: v for k, v in vars(module).items() if isinstance(v, _SCALARS) and k != "training"}
            found[f"{branch.block}.{name}".rstrip(".")] = plain
    return found


def _is_leaf(name: str, readers: Collection[str]) -> bool:
    return bool(name) and not any(reader.startswith(f"{name}.") for reader in readers)


class Rest(fx.GraphModule):
    """A block without some of its branches, which copies and pickles know as such."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (super().__reduce__(), _marks(self))

    def recompile(self) -> Any:
        """Generate the code anew; calls go the way of any module, and errors are not printed on the way."""
        code = super().recompile()
        setattr(type(self), "__call__", nn.Module.__call__)  # noqa: B010
        return code


def _restored(reduced: tuple[Any, ...], marks: tuple[_Taken, ...]) -> fx.GraphModule:
    module = reduced[0](*reduced[1])
    return _marked(Rest(module, module.graph, type(module).__name__), marks).train(module.training)


def _marked(module: fx.GraphModule, marks: tuple[_Taken, ...]) -> fx.GraphModule:
    module.meta[_MARK] = marks  # copies keep `meta`, and no other attribute
    return module


class _Trace:
    """The graph of a block, in which some layers read the channels of a branch."""

    def __init__(self, block: nn.Module, readers: Collection[str], *, training: bool = False) -> None:
        self.block, self.readers = block, set(readers)
        given = {} if isinstance(block, fx.GraphModule) else inspect.signature(block.forward).parameters
        before = set(vars(block))
        defaults = {n: p.default for n, p in given.items() if p.default is not inspect.Parameter.empty}
        try:
            with kept_modes(block):
                self.graph = _Tracer(readers).trace(block.train(training), defaults)
        except Exception as error:  # what tracing meets depends on the code of the block
            raise NotABranchError(
                f"torch.fx cannot trace it ({(str(error) or repr(error)).splitlines()[0]})"
            ) from error
        finally:
            made = [name for name in vars(block) if name not in before]
            for name in made:  # fx keeps tensors that the code makes as attributes
                delattr(block, name)
        tensors = {*dict(block.named_parameters()), *dict(block.named_buffers())}
        odd = [node.target for node in self.graph.nodes if node.op == "get_attr" and node.target not in tensors]
        if odd:
            raise NotABranchError(f"its code makes or reads a tensor that is no parameter or buffer ({odd[0]})")
        self.end, self.additions = self._merge()

    def _merge(self) -> tuple[fx.Node, list[fx.Node]]:
        """Return the result of the branch and the nodes that add it to the path around it."""
        constant, weights = set[fx.Node](), set[fx.Node]()
        for node in self.graph.nodes:
            sources = set(node.all_input_nodes)
            if node.op == "call_module" and node.target in self.readers:
                constant.add(node)
            elif node.op == "get_attr" or (sources and sources <= weights and node.op != "output"):
                weights.add(node)
            elif sources & constant and sources <= constant | weights and node.op != "output":
                constant.add(node)
        ends = [node for node in self.graph.nodes if node in constant and set(node.users) - constant]
        if len(ends) != 1:
            raise NotABranchError(f"its channels reach the rest of the block at {len(ends)} places")
        additions = [user for user in ends[0].users if user not in constant]
        for user in additions:
            terms = [a for a in user.args if isinstance(a, fx.Node)]
            if user.target not in _ADDITIONS or user.kwargs or len(terms) != 2 or len(user.args) != 2:
                raise NotABranchError(f"its result is used by {user.target}, not added")
        return ends[0], additions

    def result(self) -> fx.GraphModule:
        """Return a module that maps the inputs of the block to the result of the branch."""
        graph = fx.Graph()
        known: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            known[node] = graph.node_copy(node, lambda n: known[n])
            if node is self.end:
                graph.output(known[node])
                break
        return _clean(fx.GraphModule(self.block, graph))

    def rest(self, branch: Branch, name: str, constant: nn.Parameter) -> fx.GraphModule:
        """Return the block with the parameter `constant` [channels], called `name`, in place of the branch."""
        self.block.register_parameter(name, constant)
        try:
            with self.graph.inserting_before(self.additions[0]):
                # Its length is not written into the code, so that the constant can be cut with the path around it.
                sizes = [-1 if dim == branch.dim else 1 for dim in range(branch.dims)]
                value = self.graph.call_method("reshape", (self.graph.get_attr(name), *sizes))
            for node in self.additions:
                (other,) = (a for a in node.all_input_nodes if a is not self.end)
                with self.graph.inserting_before(node):
                    # Not in place: the constant has to be broadcast.
                    node.replace_all_uses_with(self.graph.call_function(operator.add, (other, value)))
                self.graph.erase_node(node)
            return _clean(Rest(self.block, self.graph, type(self.block).__name__))
        finally:
            delattr(self.block, name)


class _Tracer(fx.Tracer):
    """Traces the code of the modules that contain a reader; all others are leaves."""

    def __init__(self, readers: Collection[str] = ()) -> None:
        super().__init__()
        self.readers = tuple(readers)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(module_qualified_name, self.readers)


def _clean(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}_{number}"
        number += 1
