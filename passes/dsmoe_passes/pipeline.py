"""The passes in their order, each verified after it ran.

canonicalise      one spelling for casts, views, splits; assertions that tracing has settled are dropped
match_experts     a loop, grouped or batched GEMMs         -> dsmoe::experts
match_router      gate scores, groups, top-k               -> dsmoe::route
fuse_moe          gate GEMM + route + experts              -> dsmoe::moe
match_shared      shared experts added to the output       -> operands of dsmoe::moe
pack_weights      what parameters alone decide             -> new parameters
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.fuse_moe import fuse_moe
from dsmoe_passes.match_experts import match_experts
from dsmoe_passes.match_router import match_router
from dsmoe_passes.match_shared import match_shared
from dsmoe_passes.pack_weights import pack_weights
from dsmoe_passes.result import PassResult

Pass = Callable[[fx.GraphModule], PassResult]
PIPELINE: tuple[Pass, ...] = (canonicalise, match_experts, match_router, fuse_moe, match_shared, pack_weights)


@dataclass(frozen=True)
class Step:
    """One pass as it ran: what it says, how long it took, and the graph's operators before and after."""

    result: PassResult
    seconds: float
    before: dict[str, int]
    after: dict[str, int]
    graph_before: str | None = None
    graph_after: str | None = None


def run(
    gm: fx.GraphModule,
    *,
    passes: tuple[Pass, ...] = PIPELINE,
    dump: str | None = None,
    probe: Callable[[fx.GraphModule], list[torch.Tensor]] | None = None,
) -> list[Step]:
    """Run `passes` over `gm` in place.

    After each pass the graph is linted, and its outputs must have the shapes and dtypes that they had. `dump` names a
    pass (or is "all") whose graph is kept as text before and after. `probe` runs the graph on real inputs: with it,
    the outputs' numbers are compared too (debug mode; see `same_numbers`).

    Raises: RuntimeError naming the pass, if a pass breaks the graph.
    """
    steps = []
    outputs, numbers = _outputs(gm), probe(gm) if probe else None
    for run_pass in passes:
        name = run_pass.__name__
        wanted = dump in (name, "all")
        text = _text(gm) if wanted else None
        before, start = census(gm), time.perf_counter()
        result = run_pass(gm)
        seconds = time.perf_counter() - start
        gm.graph.lint()
        if _outputs(gm) != outputs:
            raise RuntimeError(
                f"{name} changed the outputs from {outputs} to {_outputs(gm)}: this is a bug in the pass"
            )
        if probe and numbers is not None:
            gm.recompile()
            after = probe(gm)
            same_numbers(name, numbers, after)
        steps.append(Step(result, seconds, before, census(gm), text, _text(gm) if wanted else None))
    gm.recompile()  # once: writing the code of a deep model takes longer than most passes
    return steps


def same_numbers(name: str, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """Raise RuntimeError if a pass changed a number by more than rounding can (32 eps of the largest, per tensor)."""
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if not old.is_floating_point():
            same = torch.equal(old, new)
            worst = float("nan")
        else:
            scale = old.double().abs().amax().item() if old.numel() else 0.0
            worst = (old.double() - new.double()).abs().amax().item() if old.numel() else 0.0
            same = worst <= 32 * torch.finfo(old.dtype).eps * scale
        if not same:
            raise RuntimeError(f"{name} changed output {i} by {worst:.3e}: this is a bug in the pass")


def census(gm: fx.GraphModule) -> dict[str, int]:
    """How often each operator is called in `gm`."""
    return dict(Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function"))


def _outputs(gm: fx.GraphModule) -> list[tuple]:
    """Ranks, static sizes and dtypes of what the graph returns."""
    rows: list[tuple] = []
    for arg in torch.utils._pytree.tree_leaves(gm.graph.output_node().args):
        val = arg.meta.get("val") if isinstance(arg, fx.Node) else arg
        if isinstance(val, torch.Tensor):
            rows.append((tuple(s if isinstance(s, int) else "?" for s in val.shape), val.dtype))
        else:
            rows.append((type(val).__name__,))
    return rows


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False, include_stride=False)
