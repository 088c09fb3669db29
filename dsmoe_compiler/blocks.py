"""Mixture-of-experts blocks of a model: found, captured once for each kind, and put back as raised graphs.

A loop over 64 experts unrolls into 1,400 nodes. Tracing it in every layer of a deep model would take minutes, so each
kind of block (same class, same settings, same shapes) is traced once, alone, with a free number of tokens, and of its
loop a few turns (see `turns`); the passes raise the loop; and while the whole model is traced, every block of that
kind runs the raised graph on its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo.config
from torch import fx, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from dsmoe_compiler.turns import TRACED, regular_loop, write_out
from dsmoe_passes import pipeline
from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.match_experts import match_experts
from dsmoe_passes.match_router import match_router

RAISING: tuple[pipeline.Pass, ...] = (canonicalise, match_experts, match_router)


@dataclass(frozen=True)
class Block:
    """A module that holds a gate and stacked experts, and the arguments it is called with."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Raised:
    """What became of one kind of block: its raised graph (None: left alone, and why), and the passes' steps."""

    graph: fx.GraphModule | None = None
    inputs: tuple[str, ...] = ()
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    out_spec: pytree.TreeSpec | None = None
    steps: tuple[pipeline.Step, ...] = ()
    reason: str | None = None
    node: str | None = None


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The smallest modules with stacked experts `[E, ., .]` and a gate `[E, H]`; without a gate, the experts alone.

    Nothing is read off names: what counts is the shapes of the parameters.
    """

    def visit(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        inner = [
            found for child, part in module.named_children() for found in visit(f"{name}.{child}".lstrip("."), part)
        ]
        return inner or ([(name, module)] if _has_gate_and_experts(module) else [])

    blocks = visit("", model)
    inside = {id(part) for _, block in blocks for part in block.modules()}
    ungated = [(n, m) for n, m in model.named_modules() if id(m) not in inside and _stacks(m, recurse=False)]
    return blocks + ungated


def _stacks(module: nn.Module, *, recurse: bool = True) -> list[torch.Size]:
    return [p.shape for p in module.parameters(recurse=recurse) if p.dim() == 3 and p.shape[0] >= 2]


def _has_gate_and_experts(module: nn.Module) -> bool:
    wanted = {(stack[0], width) for stack in _stacks(module) for width in stack[1:]}
    return any(tuple(p.shape) in wanted for p in module.parameters() if p.dim() == 2)


def kind(block: Block) -> tuple:
    """Equal for two blocks that one trace can stand for."""
    rows: list[tuple] = []
    for name, module in block.module.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in own)
        settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and not isinstance(v, torch.Tensor)}
        rows.append((name, type(module), repr(sorted(settings.items())), tensors))
    given = [
        (tuple(a.shape), a.dtype, a.device) if isinstance(a, torch.Tensor) else repr(a)
        for a in pytree.tree_leaves(block.args)
    ]
    return (tuple(rows), tuple(given))


def why_not(block: Block, model: nn.Module) -> str | None:
    """A reason to leave a block alone that its graph would not show."""
    for name, module in block.module.named_modules():
        where = f"{block.name}.{name}".rstrip(".")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{where} has hooks: fused, they would not run. Remove them before compiling"
        if hasattr(module, "parametrizations"):
            return f"{where} has parametrizations: its weights are computed, not stored"
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(block.name + ".")
        first = owners.setdefault(id(parameter), name)
        if first != name and (inside or first.startswith(block.name + ".")):
            return f"{name} is the same parameter as {first}: packing would pull the two apart"
    return None


def raise_block(block: Block, *, dump: str | None = None, debug: bool = False) -> Raised:
    """Trace one block with a free number of tokens, and run the raising passes over its graph."""
    try:
        program = _export(block)
    except (UserError, GuardOnDataDependentSymNode, RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Raised(reason=f"torch.export cannot trace it: {first_line}")
    graph, probe = program.graph_module, None
    if debug:
        graph.recompile()
        probe = _probe_of(block, program)
    steps = tuple(pipeline.run(graph, passes=RAISING, dump=dump, probe=probe))
    if graph.graph.find_nodes(op="call_function", target=torch.ops.dsmoe.experts.default):
        inputs = tuple(spec.target or "" for spec in program.graph_signature.input_specs)
        return Raised(graph, inputs, dict(program.constants), program.call_spec.out_spec, steps)
    refused = [r for step in steps for r in step.result.refused]
    if refused:
        return Raised(steps=steps, reason=refused[0].because, node=refused[0].node)
    return Raised(steps=steps, reason="no loop over experts was found in its graph")


def _export(block: Block) -> torch.export.ExportedProgram:
    """The block with a free number of tokens, its loop over experts traced for a few of them if all turns are alike."""
    count = regular_loop(block.module, block.args)
    if count is not None:
        with count.set_to(TRACED):
            program = _export_whole(block)
        if write_out(program.graph, count.value):
            return program
    return _export_whole(block)


def _export_whole(block: Block) -> torch.export.ExportedProgram:
    # Every expert brings a size of its own, so no fake tensor is met twice: its cache costs two fifths of the time.
    with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        free = _free_dimensions(block.args)
        return torch.export.export(block.module, block.args, dynamic_shapes=free, strict=False)


@contextmanager
def swapped(blocks: list[tuple[Block, Raised]]) -> Iterator[None]:
    """While open, every block that was raised runs its raised graph; afterwards all is as it was."""
    done = []
    try:
        for block, raised in blocks:
            if raised.graph is not None:
                block.module.forward = _runner(block.module, raised)  # type: ignore[method-assign]
                done.append(block.module)
        yield
    finally:
        for module in done:
            del module.forward  # the instance's; the class's own comes back


def _runner(module: nn.Module, raised: Raised) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = iter(pytree.tree_leaves((args, kwargs)))
        values = [_fetch(module, name, raised.constants) if name else next(given) for name in raised.inputs]
        assert raised.graph is not None
        assert raised.out_spec is not None
        return pytree.tree_unflatten(list(raised.graph(*values)), raised.out_spec)

    return forward


def _fetch(module: nn.Module, name: str, constants: dict[str, torch.Tensor]) -> torch.Tensor:
    if name in constants:
        return constants[name]
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _free_dimensions(arguments: tuple[Any, ...]) -> tuple[dict[int, Any] | None, ...]:
    """The token dimension of a tensor is free: the last but one of activations, the last of ids; one for all."""
    places = [a.dim() - (2 if a.is_floating_point() else 1) if isinstance(a, torch.Tensor) else -1 for a in arguments]
    sizes = {a.shape[place] for a, place in zip(arguments, places, strict=True) if place >= 0}
    together = len(sizes) == 1 and sum(place >= 0 for place in places) > 1
    free = torch.export.Dim("tokens") if together else torch.export.Dim.DYNAMIC
    return tuple({place: free} if place >= 0 else None for place in places)


def _probe_of(block: Block, program: torch.export.ExportedProgram) -> Callable[[fx.GraphModule], list[torch.Tensor]]:
    specs = program.graph_signature.input_specs
    values = [program.state_dict.get(s.target, program.constants.get(s.target)) if s.target else None for s in specs]
    given = pytree.tree_leaves(block.args)

    def probe(gm: fx.GraphModule) -> list[torch.Tensor]:
        rest = iter(given)
        with torch.no_grad():
            out = gm(*[next(rest) if v is None else v for v in values])
        return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

    return probe
