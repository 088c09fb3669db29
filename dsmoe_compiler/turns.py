"""A loop over experts traced for three of them, then written out for all: tracing is dear, copying nodes is not.

    traced      turn 0, turn 1, turn 2                      the module's own count of experts set to 3
    written     turn 0, turn 1, turn 2, turn 3 .. E-1       copies of turn 2, each reading the turn before it

Tracing 64 turns costs seconds, most of it in symbolic sizes. That turn e does what turn 2 does is not taken on trust:
the block runs once eagerly on zeros, with all its experts, and every call of torch in turn e must be that of the turn
before it, on the same values one turn later, with the number e where that one had e-1. Whatever is not so, or cannot be
run so, is traced in full. The graph is the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

TRACED = 3  # the first may begin otherwise (a sum from zeros), the second and third show what changes
FEWEST = 6  # experts that are worth it


@dataclass(frozen=True)
class Place:
    """A value by where it was made: result `out` of line `line`; lines below 0 are what was there before."""

    line: int
    out: int


@dataclass(frozen=True)
class Line:
    """One call, its arguments flat: places of values, and constants."""

    target: Any
    leaves: tuple[Any, ...]
    spec: Any


@dataclass(frozen=True)
class Turns:
    """Where the turns of a loop lie among lines: the first of turn 0, and how many a turn has."""

    start: int
    length: int

    def end(self, count: int) -> int:
        return self.start + count * self.length


@dataclass(frozen=True)
class Count:
    """The number of turns: an attribute of a module that holds as many stacked weights."""

    module: nn.Module
    name: str
    value: int

    @contextmanager
    def set_to(self, value: int) -> Iterator[None]:
        setattr(self.module, self.name, value)
        try:
            yield
        finally:
            setattr(self.module, self.name, self.value)


def regular_loop(block: nn.Module, args: tuple[Any, ...]) -> Count | None:
    """The one count whose turns are all alike; None where there is none, or it cannot be shown."""
    counts = [count for module in block.modules() for count in _counts(module)]
    if len(counts) != 1 or counts[0].value < FEWEST:
        return None
    count = counts[0]
    try:
        whole = _record(block, args)
        with count.set_to(TRACED):
            few = _record(block, args)
    except Exception:  # it does not run on zeros: then it is traced as it is
        return None
    return count if _same_turns(few, whole, count.value) else None


def write_out(graph: fx.Graph, count: int) -> bool:
    """Add the turns that were not traced; False, with the graph as it was, if its turns are not alike."""
    nodes = list(graph.nodes)
    lines = _lines_of(nodes)
    turns = _find_turns(lines, TRACED)
    if turns is None:
        return False
    last = range(turns.end(TRACED - 1), turns.end(TRACED))
    after = lines[last.stop :]
    if any(isinstance(leaf, Place) and turns.start <= leaf.line < last.start for line in after for leaf in line.leaves):
        return False
    numbers = [_numbers(lines[i - turns.length], lines[i], TRACED - 1) for i in last]
    made = {i: node for i, node in enumerate(nodes) if i < last.stop}
    outside = [(user, node) for i in last for node in [nodes[i]] for user in list(node.users)]
    outside = [(user, node) for user, node in outside if user in set(nodes[last.stop :])]
    with graph.inserting_before(nodes[last.stop]):
        for expert in range(TRACED, count):
            shift = (expert - TRACED + 1) * turns.length
            for i, where in zip(last, numbers, strict=True):
                made[i + shift] = _copy(graph, nodes[i], lines[i], where, expert, made, turns.start, shift)
    shift = (count - TRACED) * turns.length
    index = {node: i for i, node in enumerate(nodes)}
    for user, node in outside:
        user.replace_input_with(node, made[index[node] + shift])
    return True


def _copy(
    graph: fx.Graph,
    node: fx.Node,
    line: Line,
    numbers: frozenset[int],
    expert: int,
    made: dict[int, fx.Node],
    start: int,
    shift: int,
) -> fx.Node:
    """`node` of turn 2 as turn `expert` has it."""
    leaves: list[Any] = []
    for position, leaf in enumerate(line.leaves):
        if isinstance(leaf, Place):
            leaves.append(made[leaf.line + (shift if leaf.line >= start else 0)])
        else:
            leaves.append(expert if position in numbers else leaf)
    args, kwargs = pytree.tree_unflatten(leaves, line.spec)
    copied = graph.create_node(node.op, node.target, (*args, *node.args[len(args) :]), kwargs, node.name)
    copied.meta = {**node.meta}
    return copied


def _counts(module: nn.Module) -> list[Count]:
    stacks = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3}
    own = [(name, value) for name, value in vars(module).items() if type(value) is int and not name.startswith("_")]
    return [Count(module, name, value) for name, value in own if value in stacks]


def _same_turns(few: Sequence[Line], whole: Sequence[Line], count: int) -> bool:
    """Whether `whole` is `few` with its last turn repeated until there are `count`."""
    length, rest = divmod(len(whole) - len(few), count - TRACED)
    if rest or length <= 0:
        return False
    turns = _find_turns(few, TRACED, length)
    if turns is None or list(few[: turns.end(TRACED)]) != list(whole[: turns.end(TRACED)]):
        return False
    if not _alike(whole, turns, count):
        return False
    shift, traced = (count - TRACED) * length, turns.end(TRACED)
    return all(
        whole[i + shift] == _moved(few[i], turns.end(TRACED - 1), shift) and not _reads(few[i], turns, TRACED - 1)
        for i in range(traced, len(few))
    )


def _reads(line: Line, turns: Turns, before: int) -> bool:
    """Whether a line reads a value of a turn before turn `before`."""
    return any(isinstance(leaf, Place) and turns.start <= leaf.line < turns.end(before) for leaf in line.leaves)


def _find_turns(lines: Sequence[Line], count: int, length: int | None = None) -> Turns | None:
    """The longest turns that are alike and count: somewhere in a turn stands its number."""
    for size in [length] if length else range(len(lines) // count, 0, -1):
        for start in range(len(lines) - count * size + 1):
            turns = Turns(start, size)
            if _alike(lines, turns, count):
                return turns
    return None


def _alike(lines: Sequence[Line], turns: Turns, count: int) -> bool:
    """Whether each turn is the one before it, a turn later; the first may read other values."""
    first = lines[turns.start : turns.end(1)]
    second = lines[turns.end(1) : turns.end(2)]
    if any(a.target != b.target or a.spec != b.spec for a, b in zip(first, second, strict=True)):
        return False
    counted = False
    for place in range(turns.length):
        i = turns.end(2) + place
        before = lines[i - turns.length]
        numbers = _numbers(before, lines[i], 2)
        counted |= bool(numbers)
        for expert in range(2, count):
            line = lines[i + (expert - 2) * turns.length]
            if line != _later(before, turns, numbers, expert):
                return False
            before = line
    return counted


def _later(line: Line, turns: Turns, numbers: frozenset[int], expert: int) -> Line:
    """A line as the turn of `expert` must have it, the one after its own."""
    moved = _moved(line, turns.start, turns.length)
    leaves = tuple(expert if position in numbers else leaf for position, leaf in enumerate(moved.leaves))
    return Line(line.target, leaves, line.spec)


def _moved(line: Line, start: int, shift: int) -> Line:
    leaves = tuple(Place(x.line + shift, x.out) if isinstance(x, Place) and x.line >= start else x for x in line.leaves)
    return Line(line.target, leaves, line.spec)


def _numbers(before: Line, line: Line, expert: int) -> frozenset[int]:
    """Which leaves of a line are the number of its turn."""
    pairs = enumerate(zip(before.leaves, line.leaves, strict=False))
    return frozenset(i for i, (a, b) in pairs if type(a) is int and type(b) is int and (a, b) == (expert - 1, expert))


def _lines_of(nodes: Sequence[fx.Node]) -> list[Line]:
    index = {node: i for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        args = node.args[:1] if node.target is torch.ops.aten._assert_scalar.default else node.args  # without its text
        leaves, spec = pytree.tree_flatten((list(args), dict(node.kwargs)))
        own = tuple(Place(index[leaf], 0) if isinstance(leaf, fx.Node) else leaf for leaf in leaves)
        target = node.target if node.op == "call_function" else node
        lines.append(Line(target, own, spec))
    return lines


def _record(block: nn.Module, args: tuple[Any, ...]) -> list[Line]:
    """Every call of torch while the block runs on zeros, on the CPU whatever the device; its weights take no memory."""
    names = [*block.named_parameters(), *block.named_buffers()]
    weights = {name: torch.zeros((), dtype=t.dtype, device="cpu").expand(t.shape) for name, t in names}
    given = pytree.tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), args)
    recorder = _Recorder([*weights.values(), *pytree.tree_leaves(given)])
    with torch.no_grad(), recorder:
        torch.func.functional_call(block, weights, given)
    return recorder.lines


class _Recorder(TorchFunctionMode):
    """`known` are the values that were there before."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.kept: list[Any] = list(known)  # alive, so that an id stands for one value
        self.places = {id(v): Place(-1 - i, 0) for i, v in enumerate(known) if isinstance(v, torch.Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        leaves, spec = pytree.tree_flatten((list(args), dict(kwargs or {})))
        self.lines.append(Line(func, tuple(self.leaf(leaf) for leaf in leaves), spec))
        made = func(*args, **(kwargs or {}))
        for out, value in enumerate(pytree.tree_leaves(made)):
            if isinstance(value, torch.Tensor) and id(value) not in self.places:
                self.places[id(value)] = Place(len(self.lines) - 1, out)
                self.kept.append(value)
        return made

    def leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else leaf
        if id(leaf) not in self.places:  # a constant of the module, say
            self.kept.append(leaf)
            self.places[id(leaf)] = Place(-len(self.kept), 0)
        return self.places[id(leaf)]
