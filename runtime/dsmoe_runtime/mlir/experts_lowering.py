"""dsmoe.experts lowered: what the operator means, in scf, memref and vector, as one function.

before
    %y = torch.operator "torch.dsmoe.experts"(%x, %experts, %weights, %gate_up, %down, ...)

after
    @experts(x, ids, weights, gate_up, down, .., y)    workspace, @sort the slots by expert: one thread
      @work: on each thread of one region
        @gather                                tokens into the workspace, by expert
        @gate_up(hit expert, block of rows)    products and activation -> hidden state
        @down(hit expert, block of rows)       products -> answers
        @combine(token)                        weighted sum in the order of k

Experts without tokens do not occur. Every size is read from the arguments: one compiled function serves all.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.combine import WEIGHTS, combine, combine_all
from dsmoe_runtime.mlir.function import Function, matrix, symbol
from dsmoe_runtime.mlir.gate_up import Activation
from dsmoe_runtime.mlir.gather import FLAT
from dsmoe_runtime.mlir.group import Group, seen_as_rows
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.products import scratch_size
from dsmoe_runtime.mlir.sort import IDS, INDEX, TYPES, plan_of, sort_slots
from dsmoe_runtime.mlir.workspace import Workspace

PHASES = ("thread", "gather", "gate_up", "down", "combine")  # each has a counter


@dataclass(frozen=True)
class ExpertsSpec:
    """All that the code depends on; sizes are not among it."""

    element: str
    activation: Activation
    layout: str
    gate_up_bias: bool
    down_bias: bool
    level: Level

    def group(self) -> Group:
        return Group(
            "routed", self.element, self.layout, self.activation, self.gate_up_bias, self.down_bias, self.level
        )

    def weights(self) -> list[tuple[str, str]]:
        """Name and type of the arguments that hold them."""
        return [
            ("%gate_up", matrix(self.element, 3)), ("%down", matrix(self.element, 3)),
            *([("%gate_up_bias", matrix(self.element))] if self.gate_up_bias else []),
            *([("%down_bias", matrix(self.element))] if self.down_bias else []),
        ]  # fmt: skip

    def named(self, code: Code) -> None:
        """The names that the group wants for them."""
        for name in ("gate_up", "down"):
            seen_as_rows(code, f"%{name}", self.element, self.group().transposed, f"%routed_{name}")
            if self.group().product(name).bias:
                kind = matrix(self.element)
                code.line(f"%routed_{name}_bias = memref.cast %{name}_bias : {kind} to {kind}")


def experts_function(spec: ExpertsSpec) -> Function:
    """`@experts(x [T, H], ids [T, K], weights [T, K], gate_up, down, gate_up_bias?, down_bias?, y [T, H])`."""
    name = symbol("experts", spec)
    code, group = Code(name, dot=spec.level.dot), spec.group()
    group.helpers(code)
    sort_slots(code, group.batch.panels)
    combine(code, spec.element, spec.level.lanes)
    x, y = ("%x", matrix(spec.element)), ("%y", matrix(spec.element))
    arguments = [x, ("%ids", IDS), ("%weights", WEIGHTS), *spec.weights(), y]
    shared = [
        x, ("%weights", WEIGHTS), *group.arguments, y, ("%scratch", FLAT), ("%counters", team.COUNTERS),
    ]  # fmt: skip
    with code.function("work", ", ".join(f"{n}: {kind}" for n, kind in shared)):
        thread = team.claim(code, PHASES.index("thread"))
        own = f"%scratch, {code.mul(thread, scratch_size(spec.level.lanes))}"
        group.batch.gather(code, PHASES.index("gather"), "%x")
        team.barrier(code)
        for phase in ("gate_up", "down"):
            group.phase(code, phase, PHASES.index(phase), own)
            team.barrier(code)
        combine_all(code, PHASES.index("combine"), spec.element)
    team.team(code, "work", shared)
    with code.public(name, ", ".join(f"{n}: {kind}" for n, kind in arguments)):
        tokens, hidden = (code.dim("%y", axis, y[1]) for axis in range(2))
        with code.when(code.compare("ne", code.mul(tokens, hidden), 0)):
            _host(code, spec, shared, tokens)
    return Function(name, code.text(), tuple(kind for _, kind in arguments))


def _host(code: Code, spec: ExpertsSpec, shared: team.Arguments, tokens: str) -> None:
    group = spec.group()
    spec.named(code)
    kind = group.product("down").stack.kind
    experts, hidden, width = (code.dim("%routed_down", axis, kind) for axis in range(3))
    slots = code.mul(tokens, code.dim("%ids", 1, IDS))
    threads = team.threads_for(code, code.mul(code.mul(slots, hidden), width))
    space = Workspace(code)
    space.take("%counters", "i64", len(PHASES) * team.COUNTER_SPACING)
    space.take("%first", "index", experts)
    group.take(code, space, slots, experts)
    space.take("%scratch", "f32", code.mul(threads, scratch_size(spec.level.lanes)))
    space.allocate()
    group.allocated(code)
    team.reset(code, "%counters", len(PHASES))
    code.line(f"func.call @sort(%ids, {experts}, %first, {plan_of('routed')}) : ({IDS}, index, {INDEX}, {TYPES}) -> ()")
    team.run(code, "work", shared, threads)
    space.release()
