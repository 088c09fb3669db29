"""All tokens in one plan, times one matrix: what dsmoe's linear is, and the gate and shared experts of a layer in part.

take      room for the plan and the tokens          before the workspace is allocated
gather    tokens into panels, a claimed phase       x -> %{label}_packed
products  items of rows x panels, a claimed phase   -> y
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.gather import FLAT, gather, gather_panel
from dsmoe_runtime.mlir.products import BLOCK_TOKENS, ROWS_AT_ONCE, Product
from dsmoe_runtime.mlir.sort import INDEX, PLAN, TYPES, Panels, panels_for, plan_of, sort_all, take_plan
from dsmoe_runtime.mlir.workspace import Workspace

SHARES = 4  # items for each thread at least, where there are rows enough


@dataclass(frozen=True)
class Batch:
    """Tokens of `element`, laid out for weights of `weights`."""

    label: str
    element: str
    weights: str
    lanes: int
    dot: bool
    transposed: bool = False

    @property
    def panels(self) -> Panels:
        return panels_for(self.weights, self.transposed, self.lanes, self.dot)

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """What work is handed of it."""
        names = [(f"%{self.label}_{name}", INDEX) for name in PLAN]
        return [*names, (f"%{self.label}_packed", FLAT), (f"%{self.label}_pitch", "index")]

    def helpers(self, code: Code) -> None:
        """Write the functions that it calls."""
        sort_all(code, self.panels, self.label)
        gather(code, self.element, self.weights, self.lanes)

    def take(self, code: Code, space: Workspace, tokens: str, size: str) -> str:
        """Room for it -> rows of the workspace."""
        rows = take_plan(code, space, self.label, self.panels, tokens, 1)
        pitch = row_pitch(code, size, self.lanes)
        code.line(f"%{self.label}_pitch = arith.addi {pitch}, {code.index(0)} : index")
        space.take(f"%{self.label}_packed", "f32", code.mul(rows, pitch))
        return rows

    def sort(self, code: Code, tokens: str) -> None:
        """The plan."""
        code.line(f"func.call @sort_{self.label}({tokens}, {plan_of(self.label)}) : (index, {TYPES}) -> ()")

    def gather(self, code: Code, counter: int, x: str) -> None:
        """All panels, whoever is free."""
        panels = code.load(f"%{self.label}_total", code.index(1), INDEX)
        with team.claimed(code, counter, panels) as panel:
            gather_panel(code, self.element, self.weights, x, self.label, panel, f"%{self.label}_pitch")

    def products(
        self, code: Code, counter: int, product: Product, item: str, w: str, bias: str | None, y: tuple[str, str],
        own: str, threads: Value,
    ) -> None:  # fmt: skip
        """y = x w^T + bias by `@linear_{item}`, in items of some rows and up to 128 tokens."""
        kind, label = product.stack.kind, self.label
        height = code.dim(w, 1, kind)
        start, end = code.index(0), code.load(f"%{label}_hit_panel", code.index(1), INDEX)
        lane_end = code.load(f"%{label}_hit_rows", start, INDEX)
        group = BLOCK_TOKENS // (2 * self.lanes)
        groups = code.most(code.div_up(lane_end, group), 1)
        share = code.div_up(code.mul(height, groups), code.mul(threads, SHARES))
        step = code.least(code.up_to_multiple(code.most(share, 1), ROWS_AT_ONCE), product.block_rows)
        blocks = code.div_up(height, step)
        with team.claimed(code, counter, code.mul(blocks, groups)) as number:
            block, part = code.div(number, groups), code.rem(number, groups)
            begin = code.mul(block, step)
            rows = code.least(code.sub(height, begin), step)
            panel = code.mul(part, group)
            stop = code.least(code.add(panel, group), lane_end)
            is_last = code.compare("eq", code.add(part, 1), groups)
            last = code.select(is_last, end, stop)
            given = f", {bias}" if bias else ""
            code.line(
                f"func.call @linear_{item}({begin}, {rows}, {panel}, {stop}, {last}, {w}{given}, %{label}_packed, "
                f"%{label}_pitch, {y[0]}, {own}, %{label}_panel_slot) : (index, index, index, index, index, "
                f"{product.kinds}, {FLAT}, index, {matrix(y[1])}, {FLAT}, index, {INDEX}) -> ()"
            )


def row_pitch(code: Code, size: str, lanes: int) -> str:
    """Of a row of the workspace: whole steps, and no power of two, which would put all rows in the same cache sets."""
    step = 2 * lanes
    return code.add(code.up_to_multiple(size, step), step)


def as_stack(code: Code, w: str, element: str, name: str) -> None:
    """A matrix [N, K] as the weights of one expert, [1, N, K], under a name."""
    source = matrix(element)
    base, offset, sizes, strides = (code.name(hint) for hint in ("base", "offset", "sizes", "strides"))
    code.line(
        f"{base}, {offset}, {sizes}:2, {strides}:2 = memref.extract_strided_metadata {w} : {source} -> "
        f"memref<{element}>, index, index, index, index, index"
    )
    code.line(
        f"{name} = memref.reinterpret_cast {base} to offset: [{offset}], sizes: [{code.index(1)}, {sizes}#0, "
        f"{sizes}#1], strides: [{strides}#0, {strides}#0, 1] : memref<{element}> to {matrix(element, 3)}"
    )


def as_row(code: Code, bias: str, element: str, name: str) -> None:
    """A vector [N] as the bias of one expert, [1, N], under a name."""
    source = matrix(element, 1)
    base, offset, size, stride = (code.name(hint) for hint in ("base", "offset", "size", "stride"))
    code.line(
        f"{base}, {offset}, {size}, {stride} = memref.extract_strided_metadata {bias} : {source} -> "
        f"memref<{element}>, index, index, index"
    )
    code.line(
        f"{name} = memref.reinterpret_cast {base} to offset: [{offset}], sizes: [{code.index(1)}, {size}], strides: "
        f"[{size}, 1] : memref<{element}> to {matrix(element)}"
    )
