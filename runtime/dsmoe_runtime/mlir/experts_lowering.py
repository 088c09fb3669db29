"""dsmoe.experts lowered: what the operator means, in scf, memref and vector, as one module of text.

before
    %y = torch.operator "torch.dsmoe.experts"(%x, %experts, %weights, %gate_up, %down, ...)

after
    @experts(data, threads)  @prepare: @sort the slots by expert       one thread
                             @work: on each thread of one region
                               @gather_lanes | @gather_row             tokens into the workspace, by expert
                               @gate_up(hit expert, block of rows)     products and activation -> hidden state
                               @down(hit expert, block of rows)        products -> answers
                               @combine(token)                         weighted sum in the order of k

Experts without tokens do not occur. Every size is read from the arguments: one compiled module serves all.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.combine import ANSWERS, OUTPUT, WEIGHTS, combine
from dsmoe_runtime.mlir.down import down_item
from dsmoe_runtime.mlir.gate_up import gate_up_item
from dsmoe_runtime.mlir.gather import FLAT, TOKENS, gather
from dsmoe_runtime.mlir.lane_tiles import lane_rows
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.products import BLOCK_ROWS, Product
from dsmoe_runtime.mlir.row_tiles import MOST, row_range, split_pairs
from dsmoe_runtime.mlir.sort import INDEX, PLAN, Panels, sort_slots
from dsmoe_runtime.mlir.weights import Stack, unpack

PHASES = ("thread", "gather", "gate_up", "down", "combine")  # each has a counter


@dataclass(frozen=True)
class ExpertsSpec:
    """All that the code depends on; sizes are not among it."""

    element: str
    activation: str
    layout: str
    gate_up_bias: bool
    down_bias: bool
    level: Level
    output: str  # the element of y: `element`, or f32 for who adds to it before it is rounded

    @property
    def transposed(self) -> bool:
        return self.layout.endswith("_transposed")

    @property
    def panels(self) -> Panels:
        """Measured on AVX2; row tiles are at their best with bfloat16, and there are none for transposed weights."""
        lanes = self.level.lanes
        if self.transposed:
            return Panels(lanes, 1, lanes + 1)
        if split_pairs(self.element):
            return Panels(lanes, 2 * lanes, 3 * lanes // 2)
        return Panels(lanes, lanes - lanes // 8, lanes + lanes // 4)

    @property
    def gate_up(self) -> Product:
        return Product(
            Stack("%gate_up", self.element, self.transposed),
            "%gate_up_bias" if self.gate_up_bias else None,
            self.level.lanes,
        )

    @property
    def down(self) -> Product:
        return Product(
            Stack("%down", self.element, self.transposed), "%down_bias" if self.down_bias else None, self.level.lanes
        )

    def arguments(self) -> list[tuple[str, str]]:
        """Name and memref type of what the kernel is handed, in order."""
        products = [(p.stack.name, p.stack.kind) for p in (self.gate_up, self.down)]
        biases = [(p.bias, p.bias_kind) for p in (self.gate_up, self.down) if p.bias]
        return [
            ("%x", TOKENS.format(self.element)), ("%ids", INDEX), ("%weights", WEIGHTS), *products, *biases,
            ("%y", OUTPUT.format(self.output)), ("%scalars", FLAT), ("%counters", team.COUNTERS), ("%first", INDEX),
            *((f"%{name}", INDEX) for name in PLAN),
            ("%packed", "memref<?x?xf32>"), ("%hidden", "memref<?x?xf32>"), ("%answers", ANSWERS),
            ("%scratch", "memref<?x?xf32>"),
        ]  # fmt: skip


def lower_experts(spec: ExpertsSpec) -> str:
    """The whole module."""
    code, lanes = Code(), spec.level.lanes
    code.line(team.EXTERNAL)
    sort_slots(code, spec.panels)
    gather(code, spec.element, lanes)
    for vectors in (1, 2):
        lane_rows(code, lanes, vectors, spec.level.tile_rows)
    if not spec.transposed:
        for tokens in range(1, MOST + 1):
            row_range(code, spec.element, lanes, tokens)
    for product in (spec.gate_up, spec.down):
        if not product.stack.in_place:
            unpack(code, product.stack, lanes)
    gate_up_item(code, spec.gate_up, spec.layout, spec.activation)
    down_item(code, spec.down)
    combine(code, spec.output, lanes)
    signature = ", ".join(f"{name}: {kind}" for name, kind in spec.arguments())
    _prepare(code, signature, spec)
    _work(code, signature, spec)
    team.entry_points(code, "experts", spec.arguments())
    return f"module {{\n{code.text()}\n}}\n"


def _prepare(code: Code, signature: str, spec: ExpertsSpec) -> None:
    with code.function("prepare", signature):
        for counter in range(len(PHASES)):
            zero = code.let("arith.constant 0 : i64", "k")
            where = code.index(counter * team.COUNTER_SPACING)
            code.line(f"memref.store {zero}, %counters[{where}] : {team.COUNTERS}")
        top_k = code.let(f"memref.dim %weights, {code.index(1)} : {WEIGHTS}")
        kind = spec.gate_up.stack.kind
        experts = code.let(f"memref.dim %gate_up, {code.index(0)} : {kind}")
        names = ", ".join(f"%{name}" for name in PLAN)
        kinds = ", ".join([INDEX] * len(PLAN))
        code.line(
            f"func.call @sort(%ids, {top_k}, {experts}, %first, {names}) : "
            f"({INDEX}, index, index, {INDEX}, {kinds}) -> ()"
        )


def _work(code: Code, signature: str, spec: ExpertsSpec) -> None:
    lanes = spec.level.lanes
    tokens_kind = TOKENS.format(spec.element)
    with code.function("work", signature):
        thread = team.claim(code, PHASES.index("thread"))
        scratch, room = _whole(code, "%scratch")
        own = f"{scratch}, {code.mul(thread, room)}"
        packed, packed_pitch = _whole(code, "%packed")
        hidden, hidden_pitch = _whole(code, "%hidden")
        hits, panels = (code.let(f"memref.load %total[{code.index(n)}] : {INDEX}") for n in (0, 1))
        alpha, limit = (code.let(f"memref.load %scalars[{code.index(n)}] : {FLAT}") for n in (0, 1))
        with team.claimed(code, PHASES.index("gather"), panels) as panel:
            slot = code.let(f"memref.load %panel_slot[{panel}] : {INDEX}")
            after = code.let(f"memref.load %panel_slot[{code.add(panel, 1)}] : {INDEX}")
            width = code.sub(after, slot)
            with code.when(code.compare("uge", width, lanes)):
                code.line(
                    f"func.call @gather_lanes(%x, %order, {slot}, {width}, {packed}, {packed_pitch}) : "
                    f"({tokens_kind}, {INDEX}, index, index, {FLAT}, index) -> ()"
                )
            with code.when(code.compare("ult", width, lanes)), code.loop(slot, after, 1) as one:
                code.line(
                    f"func.call @gather_row(%x, %order, {one.index}, {packed}, {packed_pitch}) : "
                    f"({tokens_kind}, {INDEX}, index, {FLAT}, index) -> ()"
                )
        team.barrier(code)
        plan = "%hit_expert, %hit_panel, %hit_rows, %panel_slot"
        plan_kinds = ", ".join([INDEX] * 4)
        for phase, product, parts in (
            ("gate_up", spec.gate_up, 1 if spec.layout.startswith("ungated") else 2), ("down", spec.down, 1),
        ):  # fmt: skip
            stack = product.stack
            rows = code.let(f"memref.dim {stack.name}, {code.index(1)} : {stack.kind}")
            blocks = code.let(f"arith.ceildivui {rows}, {code.index(BLOCK_ROWS // parts * parts)} : index")
            if phase == "gate_up":
                blocks = code.let(f"arith.ceildivui {code.div(rows, parts)}, {code.index(BLOCK_ROWS // parts)} : index")
            bias, bias_kind = (f", {product.bias}", f", {product.bias_kind}") if product.bias else ("", "")
            with team.claimed(code, PHASES.index(phase), code.mul(hits, blocks)) as item:
                hit, block = code.div(item, blocks), code.rem(item, blocks)
                if phase == "gate_up":
                    values = f"{packed}, {packed_pitch}, {hidden}, {hidden_pitch}, {own}, {plan}, {alpha}, {limit}"
                    kinds = f"{FLAT}, index, {FLAT}, index, {FLAT}, index, {plan_kinds}, f32, f32"
                else:
                    values = f"{hidden}, {hidden_pitch}, %answers, {own}, {plan}"
                    kinds = f"{FLAT}, index, {ANSWERS}, {FLAT}, index, {plan_kinds}"
                code.line(
                    f"func.call @{phase}({hit}, {block}, {stack.name}{bias}, {values}) : "
                    f"(index, index, {stack.kind}{bias_kind}, {kinds}) -> ()"
                )
            team.barrier(code)
        output = OUTPUT.format(spec.output)
        tokens = code.let(f"memref.dim %y, {code.index(0)} : {output}")
        with team.claimed(code, PHASES.index("combine"), tokens) as token:
            code.line(
                f"func.call @combine({token}, %weights, %place, %answers, %y) : "
                f"(index, {WEIGHTS}, {INDEX}, {ANSWERS}, {output}) -> ()"
            )


def _whole(code: Code, matrix: str) -> tuple[str, str]:
    """A matrix of the workspace as one row of numbers, and the pitch of its rows."""
    kind = "memref<?x?xf32>"
    height, pitch = (code.let(f"memref.dim {matrix}, {code.index(n)} : {kind}") for n in (0, 1))
    size = code.mul(height, pitch)
    return code.let(
        f"memref.reinterpret_cast {matrix} to offset: [0], sizes: [{size}], strides: [1] : {kind} to {FLAT}"
    ), pitch
