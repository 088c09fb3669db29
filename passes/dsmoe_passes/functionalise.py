"""In-place operations on values that nobody else sees -> the operations that return a new tensor.

Before                                                       After
  d_TK = aten.div_.Tensor(w_TK, s_T1)                           d_TK = aten.div.Tensor(w_TK, s_T1)
  m_TG = aten.scatter_.value(z_TG, 1, i_TK, 1)                  m_TG = aten.scatter.value(z_TG, 1, i_TK, 1)

What `torch.export` gives has them, what a back end of torch.compile sees has not. A value may be overwritten unseen if
it was computed in the graph, neither it nor what it is a view of has another reader from there on, and no view of it
has. Other writes stay, and the matchers refuse what they touch. Numbers do not change.
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx

from dsmoe_passes.result import PassResult


def functionalise(gm: fx.GraphModule) -> PassResult:
    """Rewrite `gm` in place; see the module's text."""
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        pure = _pure(node) if writes(node) else None
        if pure is not None and _unseen(node.args[0], node):
            node.target = pure
            counts["in-place operation rewritten"] += 1
    gm.graph.eliminate_dead_code()
    return PassResult("functionalise", removed=dict(counts))


def writes(node: fx.Node) -> bool:
    """Whether `node` overwrites one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _pure(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operation without its trailing underscore, if it takes the same arguments."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name, arguments = target._schema.name.split("::"), target._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    packet = getattr(getattr(torch.ops, name[0]), name[1].removesuffix("_"), None)
    if not name[1].endswith("_") or packet is None or written != [arguments[0].name]:
        return None
    pure = getattr(packet, target._overloadname, None)
    same = pure is not None and [a.name for a in pure._schema.arguments] == [a.name for a in arguments]
    return pure if same else None


def _unseen(value: object, writer: fx.Node, through: fx.Node | None = None) -> bool:
    """Whether nobody but `writer` reads `value`, or memory that it shares, from `writer` on.

    `through` is the view of `value` that is overwritten, if it is not `value` itself.
    """
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    through = through or writer
    for user in value.users:
        if user is not through and (user >= writer or (_views(user, value) and not _silent(user, writer))):
            return False
    source = value.args[0] if value.args else None
    return not (isinstance(source, fx.Node) and _views(value, source)) or _unseen(source, writer, value)


def _silent(view: fx.Node, writer: fx.Node) -> bool:
    """Whether no view of what is overwritten, `view` included, is read by `writer` or later."""
    return all(
        user is not writer and user < writer and (not _views(user, view) or _silent(user, writer))
        for user in view.users
    )


def _views(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` may share memory with `source`, which it reads."""
    if node.target is operator.getitem:
        return isinstance(source.target, torch._ops.OpOverload) and _aliases(source.target)
    return not isinstance(node.target, torch._ops.OpOverload) or _aliases(node.target)


def _aliases(target: torch._ops.OpOverload) -> bool:
    reads = [a.alias_info for a in target._schema.arguments if a.alias_info is not None]
    # to and reshape say nothing of it and may return what they were given
    return bool(reads) or target._schema.name in ("aten::to", "aten::reshape", "aten::contiguous", "aten::flatten")
