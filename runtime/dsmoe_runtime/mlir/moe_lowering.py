"""dsmoe.moe lowered: gate, routed experts and shared experts of a layer, in one parallel region.

before
    %y, %experts = torch.operator "torch.dsmoe.moe"(%x, %router_weight, ...)

after
    @moe(x, router_weight, .., y, ids)      workspace; plans of all tokens
      @work, on each thread; a line is a phase, and a barrier comes after it
        gather all tokens                   for the gate, and for the shared experts
        logits = x router^T                 and the logits of the shared experts' own gate
        route each token                    who is last sorts the slots; the others go on with
          gate and up of the shared experts
        gather the routed slots
        gate and up of the routed experts
        down of both
        combine each token                  weighted sum in the order of k, then the shared answer; rounded once
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.batch import Batch, as_row, as_stack
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.combine import combine, combine_all
from dsmoe_runtime.mlir.experts_lowering import ExpertsSpec
from dsmoe_runtime.mlir.function import Function, matrix, symbol
from dsmoe_runtime.mlir.gate_up import parts_of
from dsmoe_runtime.mlir.gather import FLAT
from dsmoe_runtime.mlir.group import Group
from dsmoe_runtime.mlir.linear_item import linear_item
from dsmoe_runtime.mlir.products import Product, scratch_size, tiles
from dsmoe_runtime.mlir.route_lowering import LOGITS, RouteSpec, call_route, route_token, take_rows
from dsmoe_runtime.mlir.sort import IDS, INDEX, TYPES, plan_of, sort_slots
from dsmoe_runtime.mlir.weights import Stack
from dsmoe_runtime.mlir.workspace import Workspace

PHASES = (
    "thread", "gather_gate", "gather_shared", "logits", "share", "route", "routed", "shared_gate_up", "gather",
    "gate_up", "down", "shared_down", "combine",
)  # fmt: skip


@dataclass(frozen=True)
class MoeSpec:
    """All that the code depends on; sizes are not among it, but for K and the groups of experts."""

    experts: ExpertsSpec
    gate: RouteSpec
    router: str  # the element of router_weight
    router_bias: str | None
    shared: bool
    shared_gate: bool

    @property
    def shared_group(self) -> Group | None:
        of = self.experts
        layout = "concat" if parts_of(of.layout) == 2 else "ungated"
        return Group("shared", of.element, layout, of.activation, False, False, of.level) if self.shared else None

    @property
    def gate_batch(self) -> Batch:
        """That of the shared experts where it will do."""
        level = self.experts.level
        if self.shared and self.router == self.experts.element:
            return Batch("shared", self.router, self.router, level.lanes, level.dot)
        return Batch("gate", self.experts.element, self.router, level.lanes, level.dot)

    @property
    def router_product(self) -> Product:
        return Product(Stack(self.router, False), self.router_bias, self.experts.level)

    @property
    def share_product(self) -> Product:
        return Product(Stack(self.experts.element, False), None, self.experts.level)

    def arguments(self) -> list[tuple[str, str]]:
        """The tensors of ops/moe.py that there are, then what is written."""
        element = self.experts.element
        found = [("%x", matrix(element)), ("%router_weight", matrix(self.router))]
        if self.router_bias:
            found.append(("%router_bias", matrix(self.router_bias, 1)))
        if self.gate.bias:
            found.append(("%bias", matrix(self.gate.bias, 1)))
        found += self.experts.weights()
        if self.shared:
            found += [("%shared_gate_up_2", matrix(element)), ("%shared_down_2", matrix(element))]
        if self.shared_gate:
            found.append(("%shared_gate", matrix(element)))
        return [*found, ("%y", matrix(element)), ("%ids", IDS)]

    def handed(self) -> list[tuple[str, str]]:
        """What work is handed."""
        element, routed, shared, batch = self.experts.element, self.experts.group(), self.shared_group, self.gate_batch
        found = [("%x", matrix(element)), ("%router", self.router_product.stack.kind)]
        if self.router_bias:
            found.append(("%router_bias_2", self.router_product.bias_kind))
        if batch.label == "gate":
            found += batch.arguments
        if shared is not None:
            found += shared.arguments
        if self.shared_gate:
            found += [("%shared_gate_3", self.share_product.stack.kind), ("%share", LOGITS)]
        return [
            *found, *self.gate.arguments(), *self.gate.own(), *routed.arguments, ("%y", matrix(element)),
            ("%first", INDEX), ("%scratch", FLAT), ("%threads", "index"), ("%counters", team.COUNTERS),
        ]  # fmt: skip


def moe_function(spec: MoeSpec) -> Function:
    """`@moe(the tensors of ops/moe.py that there are, y [T, H], experts [T, K])`."""
    name = symbol("moe", spec)
    code = Code(name, dot=spec.experts.level.dot)
    _helpers(code, spec)
    handed = spec.handed()
    with code.function("work", ", ".join(f"{n}: {kind}" for n, kind in handed)):
        _work(code, spec)
    team.team(code, "work", handed)
    arguments = spec.arguments()
    with code.public(name, ", ".join(f"{n}: {kind}" for n, kind in arguments)):
        tokens, hidden = (code.dim("%x", axis, matrix(spec.experts.element)) for axis in range(2))
        with code.when(code.compare("ne", code.mul(tokens, hidden), 0)):
            _host(code, spec, tokens, hidden)
    return Function(name, code.text(), tuple(kind for _, kind in arguments))


def _helpers(code: Code, spec: MoeSpec) -> None:
    routed, shared = spec.experts.group(), spec.shared_group
    routed.helpers(code)
    sort_slots(code, routed.batch.panels)
    tiles(code, spec.router_product)
    linear_item(code, spec.router_product, "router", "f32")
    spec.gate_batch.helpers(code)
    if shared is not None:
        shared.helpers(code)
        if spec.gate_batch.label != "shared":
            shared.batch.helpers(code)
    if spec.shared_gate:
        linear_item(code, spec.share_product, "share", "f32")
    route_token(code, spec.gate)
    combine(code, spec.experts.element, spec.experts.level.lanes, shared=spec.shared, share=spec.shared_gate)


def _work(code: Code, spec: MoeSpec) -> None:
    routed, shared, batch = spec.experts.group(), spec.shared_group, spec.gate_batch
    thread = team.claim(code, PHASES.index("thread"))
    own = f"%scratch, {code.mul(thread, scratch_size(spec.experts.level.lanes))}"
    batch.gather(code, PHASES.index("gather_gate"), "%x")
    if shared is not None and batch.label != "shared":
        shared.batch.gather(code, PHASES.index("gather_shared"), "%x")
    team.barrier(code)
    batch.products(
        code, PHASES.index("logits"), spec.router_product, "router", "%router",
        "%router_bias_2" if spec.router_bias else None, ("%logits", "f32"), own, "%threads",
    )  # fmt: skip
    if shared is not None and spec.shared_gate:
        shared.batch.products(
            code, PHASES.index("share"), spec.share_product, "share", "%shared_gate_3", None, ("%share", "f32"), own,
            "%threads",
        )  # fmt: skip
    team.barrier(code)
    tokens = code.dim("%y", 0, matrix(spec.experts.element))
    with team.claimed(code, PHASES.index("route"), tokens) as token:
        call_route(code, spec.gate, thread, token)
        done = team.claim(code, PHASES.index("routed"))
        with code.when(code.compare("eq", code.add(done, 1), tokens)):
            experts = code.dim("%routed_down", 0, routed.product("down").stack.kind)
            kinds = f"({IDS}, index, {INDEX}, {TYPES}) -> ()"
            code.line(f"func.call @sort(%ids, {experts}, %first, {plan_of('routed')}) : {kinds}")
    if shared is not None:
        shared.phase(code, "gate_up", PHASES.index("shared_gate_up"), own)
    team.barrier(code)
    routed.batch.gather(code, PHASES.index("gather"), "%x")
    team.barrier(code)
    routed.phase(code, "gate_up", PHASES.index("gate_up"), own)
    team.barrier(code)
    routed.phase(code, "down", PHASES.index("down"), own)
    if shared is not None:
        shared.phase(code, "down", PHASES.index("shared_down"), own)
    team.barrier(code)
    combine_all(code, PHASES.index("combine"), spec.experts.element, shared=spec.shared, share=spec.shared_gate)


def _host(code: Code, spec: MoeSpec, tokens: str, hidden: str) -> None:
    routed, shared, batch = spec.experts.group(), spec.shared_group, spec.gate_batch
    spec.experts.named(code)
    as_stack(code, "%router_weight", spec.router, "%router")
    if spec.router_bias:
        as_row(code, "%router_bias", spec.router_bias, "%router_bias_2")
    if shared is not None:
        for name in ("gate_up", "down"):
            as_stack(code, f"%shared_{name}_2", spec.experts.element, f"%shared_{name}")
    if spec.shared_gate:
        as_stack(code, "%shared_gate", spec.experts.element, "%shared_gate_3")
    kind = routed.product("down").stack.kind
    experts, width = code.dim("%routed_down", 0, kind), code.dim("%routed_down", 2, kind)
    slots = code.mul(tokens, spec.gate.top_k)
    threads = team.threads_for(code, code.mul(code.mul(slots, hidden), width))
    code.line(f"%threads = arith.addi {threads}, {code.index(0)} : index")
    space = Workspace(code)
    space.take("%counters", "i64", len(PHASES) * team.COUNTER_SPACING)
    space.take("%first", "index", experts)
    if batch.label == "gate":
        batch.take(code, space, tokens, hidden)
    if shared is not None:
        shared.take(code, space, tokens, 1)
    routed.take(code, space, slots, experts)
    take_rows(code, space, spec.gate, threads, experts)
    matrices = {"%logits": experts, "%weights": code.index(spec.gate.top_k)}
    if spec.shared_gate:
        matrices["%share"] = code.index(1)
    for name, columns in matrices.items():
        space.take(f"{name}_own", "f32", tokens, columns)
    space.take("%scratch", "f32", code.mul(threads, scratch_size(spec.experts.level.lanes)))
    space.allocate()
    for name in matrices:
        code.line(f"{name} = memref.cast {name}_own : memref<?x?xf32> to {LOGITS}")
    team.reset(code, "%counters", len(PHASES))
    routed.allocated(code)
    if shared is not None:
        shared.allocated(code)
        shared.batch.sort(code, tokens)
    if batch.label == "gate":
        batch.sort(code, tokens)
    team.run(code, "work", spec.handed(), threads)
    space.release()
