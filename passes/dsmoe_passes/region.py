"""Cut a region out of a graph, compare two regions, or run one on given tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dsmoe_passes.result import Mismatch

aten = torch.ops.aten


def value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that tracing recorded for `node`."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        raise Mismatch(node, f"{node.name} ({node.target}) carries no tensor value")
    return val


def is_weight(node: fx.Node) -> bool:
    """Whether `node` is a value that enters the graph whole: a parameter, a buffer or an input."""
    return node.op in ("placeholder", "get_attr")


def is_symbol(node: fx.Node) -> bool:
    """Whether `node` is an integer of shape arithmetic rather than a tensor."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymBool))


def same_size(one: object, other: object) -> bool:
    """Whether two sizes are equal whatever the inputs."""
    return bool(statically_known_true(one == other))


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument that may be given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def same_tensor(node: fx.Node) -> fx.Node:
    """`node` without the views in front of it that change neither shape nor dtype."""
    while node.op == "call_function" and node.target in (aten.view.default, aten.alias.default):
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(value(source).shape) != len(value(node).shape):
            return node
        node = source
    return node


def uncast(node: fx.Node) -> fx.Node:
    """`node` without a cast in front of it."""
    while node.op == "call_function" and node.target is aten._to_copy.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def between(outputs: Iterable[fx.Node], stop: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute `outputs`, in graph order, and the tensors at which the walk back stopped.

    The walk stops at `stop`, at weights, and at integers of shape arithmetic (which belong to neither list).
    """
    inside: set[fx.Node] = set()
    leaves: set[fx.Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node in inside or node in leaves:
            continue
        if stop(node) or is_weight(node):
            if not is_symbol(node):
                leaves.add(node)
        elif not is_symbol(node):
            inside.add(node)
            todo.extend(node.all_input_nodes)
    return sorted(inside), sorted(leaves)


def fingerprint(nodes: list[fx.Node], inputs: list[fx.Node]) -> tuple:
    """The region's computation with node names replaced by positions: equal for isomorphic regions."""
    where: dict[fx.Node, Any] = {node: ("input", i) for i, node in enumerate(inputs)}
    rows = []
    for i, node in enumerate(nodes):
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: where.get(n, ("outside", n.name)))
        rows.append((str(node.target), repr(args)))
        where[node] = ("node", i)
    return tuple(rows)


def run(
    nodes: list[fx.Node],
    results: list[fx.Node],
    given: dict[fx.Node, torch.Tensor],
    sizes: dict[str, int] | None = None,
) -> list[torch.Tensor]:
    """Evaluate a region on real tensors.

    Integers from outside take the value that `sizes` gives for their symbolic expression, or else had while tracing.
    """
    env: dict[fx.Node, Any] = dict(given)
    sizes = sizes or {}

    def lookup(node: fx.Node) -> Any:
        if node not in env:
            if not is_symbol(node):
                raise Mismatch(node, f"{node.name} is needed to probe the region but lies outside it")
            env[node] = sizes.get(str(node.meta["val"]), size_hint(node))
        return env[node]

    for node in nodes:
        if node in env:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        assert callable(node.target)
        env[node] = node.target(*args, **kwargs)
    return [env[node] for node in results]  # type: ignore[misc]


def size_hint(node: fx.Node) -> int:
    """The concrete value that an integer of shape arithmetic had while tracing."""
    val = node.meta["val"]
    if isinstance(val, torch.SymInt):
        hint = val.node.hint
        if hint is None:
            raise Mismatch(node, f"{node.name} depends on data; the region cannot be probed")
        return int(hint)
    return int(val)


def literals(nodes: Iterable[fx.Node], kind: type) -> list:
    """Constants of type `kind` (bool is no int here) among the arguments of `nodes`, without repeats, in order."""
    found: list = []

    def visit(arg: object) -> None:
        if type(arg) is kind and arg not in found:
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                visit(item)

    for node in nodes:
        visit(list(node.args))
        visit(list(node.kwargs.values()))
    return found


def call(
    graph: fx.Graph, target: Callable, args: tuple, *, before: fx.Node, like: fx.Node, kwargs: dict | None = None
) -> fx.Node:
    """Insert a call in front of `before`, with its fake value, and the module path of `like`."""
    kwargs = kwargs or {}
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    fake_args = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for v in _tensors(fake_args) if hasattr(v, "fake_mode")), None)
    if mode is None:
        node.meta["val"] = target(*fake_args[0], **fake_args[1])
    else:
        with mode:
            node.meta["val"] = target(*fake_args[0], **fake_args[1])
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def item(graph: fx.Graph, source: fx.Node, index: int, *, before: fx.Node) -> fx.Node:
    """Insert `source[index]`."""
    with graph.inserting_before(before):
        node = graph.call_function(operator.getitem, (source, index))
    node.meta["val"] = source.meta["val"][index]
    return node


def _tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
