"""Calls of dsmoe:: operators -> calls of the functions that launch their Triton kernels, so that packages carry them.

    y, experts = torch.ops.dsmoe.moe(x, ...)
    ->
    y, experts = dsmoe_runtime.kernels.moe.moe(x, ...)

AOTInductor traces into the second, makes each launch a node of its graph, compiles the kernels and puts the binaries
into the package, which then runs without Python. Numbers are those of the operator on the GPU.

What is traced must be right for every size that is free (the prompt's length): the functions may branch on such a size
only where either way gives the same result, one of them sooner; the branch of the traced size is taken. Then they
allocate with `torch.empty`, launch with `kernels.launch.launch`, and read nothing back.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops import cuda


@dataclass(frozen=True)
class Kept:
    """A call that stays one, since its kernels cannot serve it: the package then needs Python where it runs."""

    node: str
    operator: str
    reason: str


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """The same operations on the same tensors, to be changed."""
    made = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    made.meta = dict(graph.meta)
    return made


def lower(graph: fx.GraphModule) -> list[Kept]:
    """Let `graph` call kernels, and return the operators that it still calls."""
    kept = []
    for node in graph.graph.nodes:
        name = operator_name(node)
        if name is None:
            continue
        reason = cuda.why_not(name, values(node))
        if reason is None:
            node.args, node.kwargs = positional(node), {}
            node.target = for_any_size(cuda.kernels(name))
        else:
            kept.append(Kept(node.name, f"dsmoe::{name}", reason))
    graph.recompile()
    return kept


def for_any_size(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch`, whose branches on a free size leave no trace: the graph must not be optimised for this side of them.

    Raises: TargetError, when a kernel is cut for exactly the traced size.
    """

    @wraps(launch)
    def call(*arguments: Any) -> Any:
        sizes: list[Any] = [size for a in arguments if isinstance(a, torch.Tensor) for size in a.shape]
        free = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
        if free is None:
            return launch(*arguments)
        environment, fixed = free.node.shape_env, []

        def note(_prefix: str, guard: Any, *_: Any, **__: Any) -> None:
            fixed.extend([guard] if isinstance(guard, sympy.Eq) else [])

        environment._log_guard = note  # hides the class's own; it is told of every branch
        try:
            with environment.suppress_guards():
                result = launch(*arguments)
        finally:
            del environment._log_guard
        if fixed:
            raise TargetError(f"{launch.__name__}: a kernel is cut for {fixed[0]}, but that is free: please report")
        return result

    return call


def operator_name(node: fx.Node) -> str | None:
    """NAME of `dsmoe::NAME`, if that is what the node calls."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dsmoe":
        return node.target._schema.name.partition("::")[2]
    return None


def positional(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of a call, as its schema orders them, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    rest = [node.kwargs.get(a.name, a.default_value) for a in arguments[len(node.args) :]]
    return (*node.args, *rest)


def values(node: fx.Node) -> tuple[Any, ...]:
    """The arguments with fake tensors (or weights) in the place of nodes."""
    owner = node.graph.owning_module

    def value(argument: fx.Node) -> Any:
        if "val" in argument.meta:
            return argument.meta["val"]
        assert argument.op == "get_attr", argument
        return reduce(getattr, str(argument.target).split("."), owner)

    return map_arg(positional(node), value)  # type: ignore[no-any-return]


@contextmanager
def analysed() -> Iterator[None]:
    """Raises on leaving: TargetError, if torch could not tell what a kernel writes while a graph was traced inside.

    It then takes every tensor for written, weights included, and copies them at each call. Inline assembly does that.
    """
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch._higher_order_ops.triton_kernel_wrap")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if any("every input is mutated" in message for message in heard):
        raise TargetError("torch cannot tell what one of our kernels writes, and would copy all weights: please report")


def check_lowered(file: str, called: dict[str, int], kept: list[Kept]) -> None:
    """Raises: TargetError, if a package calls an operator of ours that is not among `kept`: it would need Python."""
    left = sorted(name for name in called if "dsmoe" in name and name not in {call.operator for call in kept})
    if left:
        raise TargetError(f"{file} still calls {', '.join(left)}, whose kernels should be in it: please report this")
