"""The experts of one kind, routed or shared: their part of the workspace, and their phases of a layer's region.

take       room for plan, tokens, hidden state; the answers take the place of the tokens
gather     panels of tokens                                   x -> %{label}_packed
gate_up    items (hit expert, block of rows)                  -> %{label}_hidden
down       items (hit expert, block of rows)                  -> %{label}_answers
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.batch import Batch, row_pitch
from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.down import ANSWERS, down_item
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.gate_up import Activation, gate_up_item, parts_of
from dsmoe_runtime.mlir.gather import FLAT, gather
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.products import Product, tiles
from dsmoe_runtime.mlir.sort import INDEX, plan_of, take_plan
from dsmoe_runtime.mlir.weights import Stack
from dsmoe_runtime.mlir.workspace import Workspace

_USED = ("hit_expert", "hit_panel", "hit_rows", "panel_slot")


@dataclass(frozen=True)
class Group:
    """Weights are `%{label}_gate_up` and `%{label}_down`, [E, N, K] by their strides; biases have `_bias` behind."""

    label: str
    element: str
    layout: str
    activation: Activation
    gate_up_bias: bool
    down_bias: bool
    level: Level

    @property
    def transposed(self) -> bool:
        return self.layout.endswith("_transposed")

    @property
    def batch(self) -> Batch:
        return Batch(self.label, self.element, self.element, self.level.lanes, self.level.dot, self.transposed)

    def product(self, name: str) -> Product:
        bias = self.gate_up_bias if name == "gate_up" else self.down_bias
        return Product(Stack(self.element, self.transposed), self.element if bias else None, self.level)

    def variant(self, name: str) -> str:
        """What its items are called after: groups whose weights lie alike share them."""
        if name == "gate_up":
            return self.layout + ("_bias" if self.gate_up_bias else "")
        return ("columns" if self.transposed else "rows") + ("_bias" if self.down_bias else "")

    @property
    def weights(self) -> list[tuple[str, str]]:
        """Its weights and biases, as work is handed them."""
        found = []
        for name in ("gate_up", "down"):
            product = self.product(name)
            found.append((f"%{self.label}_{name}", product.stack.kind))
            if product.bias:
                found.append((f"%{self.label}_{name}_bias", product.bias_kind))
        return found

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """What work is handed of it, but x."""
        label = self.label
        return [
            *self.weights, *self.batch.arguments, (f"%{label}_hidden", FLAT), (f"%{label}_hidden_pitch", "index"),
            (f"%{label}_answers", ANSWERS),
        ]  # fmt: skip

    def helpers(self, code: Code) -> None:
        """Write the functions that it calls, but for sorting."""
        for name in ("gate_up", "down"):
            tiles(code, self.product(name))
        gather(code, self.element, self.element, self.level.lanes)
        gate_up_item(code, self.product("gate_up"), self.variant("gate_up"), self.layout, self.activation)
        down_item(code, self.product("down"), self.variant("down"))

    def take(self, code: Code, space: Workspace, slots: str, experts: Value) -> None:
        """Room for so many slots."""
        label, kind, lanes = self.label, self.product("down").stack.kind, self.level.lanes
        hidden, width = (code.dim(f"%{label}_down", axis, kind) for axis in (1, 2))
        rows = take_plan(code, space, label, self.batch.panels, slots, experts)
        for name, size in (("", hidden), ("_hidden", width)):
            code.line(f"%{label}{name}_pitch = arith.addi {row_pitch(code, size, lanes)}, {code.index(0)} : index")
        space.take(f"%{label}_answers", "f32", rows, f"%{label}_pitch")
        space.take(f"%{label}_hidden", "f32", code.mul(rows, f"%{label}_hidden_pitch"))

    def allocated(self, code: Code) -> None:
        """Names for what was taken: by the time there are answers, nobody needs the tokens any more."""
        label = self.label
        sizes = [code.dim(f"%{label}_answers", axis, ANSWERS) for axis in range(2)]
        code.line(
            f"%{label}_packed = memref.reinterpret_cast %{label}_answers to offset: [0], "
            f"sizes: [{code.mul(*sizes)}], strides: [1] : {ANSWERS} to {FLAT}"
        )

    def phase(self, code: Code, name: str, counter: int, own: str) -> None:
        """gate_up or down: all items, whoever is free."""
        label, product = self.label, self.product(name)
        parts = parts_of(self.layout) if name == "gate_up" else 1
        rows = code.div(code.dim(f"%{label}_{name}", 1, product.stack.kind), parts)
        blocks = code.div_up(rows, product.block_rows // parts)
        hits = code.load(f"%{label}_total", code.index(0), INDEX)
        bias = f", %{label}_{name}_bias" if product.bias else ""
        if name == "gate_up":
            values = f"%{label}_packed, %{label}_pitch, %{label}_hidden, %{label}_hidden_pitch"
            kinds = f"{FLAT}, index, {FLAT}, index"
        else:
            values = f"%{label}_hidden, %{label}_hidden_pitch, %{label}_answers"
            kinds = f"{FLAT}, index, {ANSWERS}"
        with team.claimed(code, counter, code.mul(hits, blocks)) as item:
            hit, block = code.div(item, blocks), code.rem(item, blocks)
            code.line(
                f"func.call @{name}_{self.variant(name)}({hit}, {block}, %{label}_{name}{bias}, {values}, {own}, "
                f"{plan_of(label, _USED)}) : (index, index, {product.kinds}, {kinds}, {FLAT}, index, "
                f"{', '.join([INDEX] * len(_USED))}) -> ()"
            )


def seen_as_rows(code: Code, w: str, element: str, transposed: bool, name: str) -> None:
    """Weights [E, N, K], or [E, K, N] the other way round, as [E, N, K] by their strides, under a name."""
    given, wanted = matrix(element, 3), Stack(element, transposed).kind
    if not transposed:
        code.line(f"{name} = memref.cast {w} : {given} to {wanted}")
        return
    turned = f"memref<?x?x?x{element}, strided<[?, 1, ?], offset: ?>>"
    view = code.let(f"memref.transpose {w} (e, k, n) -> (e, n, k) : {given} to {turned}")
    code.line(f"{name} = memref.cast {view} : {turned} to {wanted}")
