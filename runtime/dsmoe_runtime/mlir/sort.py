"""Counting sort of slots by expert, and the panels in which each expert's tokens are then multiplied.

    ids of N = T K slots       5 2 5 9 2 5           an id outside [0, E) is skipped
    count, then place          expert 2: slots 1 4    expert 5: slots 0 2 5    expert 9: slot 3
    panels of an expert        first 2 L or L tokens each (lane tiles), then groups of up to three (row tiles)

A last panel that is nearly full is filled up with copies of token 0, whose results nobody reads. One thread does this,
before the others start: it is a few microseconds for hundreds of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.row_tiles import MOST

INDEX = "memref<?xindex>"
# What the sort leaves for the others: name and meaning.
PLAN = {
    "total": "[0] hit experts, [1] panels, [2] rows of the workspace in use",
    "hit_expert": "[E] the expert",
    "hit_panel": "[E + 1] its first panel; the next one's is its end",
    "hit_rows": "[E] its first panel of row tiles",
    "panel_slot": "[N + 1] the first row of the workspace that belongs to a panel; the next one's is its end",
    "order": "[rows] the token of each row of the workspace",
    "place": "[N] the row of each slot, or -1",
}
SIGNATURE = ", ".join(f"%{name}: {INDEX}" for name in PLAN)


@dataclass(frozen=True)
class Panels:
    """Which tokens of an expert beyond whole panels of 2 L still go through lane tiles, and which through row tiles."""

    lanes: int
    from_half: int  # so many fill a panel of L
    from_whole: int  # and so many one of 2 L

    def rows(self, slots: int, num_experts: int) -> int:
        """Rows of the workspace that may be used at most."""
        return slots + min(slots, num_experts) * 2 * self.lanes

    def split(self, code: Code, count: str) -> tuple[str, str]:
        """Of an expert with `count` tokens: rows in lane tiles (padding included), and rows in all."""
        whole = code.down_to_multiple(count, 2 * self.lanes)
        rest = code.sub(count, whole)
        half = code.compare("uge", rest, self.from_half)
        filled = code.let(f"arith.select {half}, {code.add(whole, self.lanes)}, {whole} : index")
        all_of_it = code.compare("uge", rest, self.from_whole)
        in_lanes = code.let(f"arith.select {all_of_it}, {code.add(whole, 2 * self.lanes)}, {filled} : index")
        return in_lanes, code.let(f"arith.maxsi {in_lanes}, {count} : index")


def sort_slots(code: Code, panels: Panels) -> None:
    """Write `@sort(ids, top_k, experts, first, PLAN)`; `first` is room for E numbers."""

    def load(memory: str, at: str) -> str:
        return code.let(f"memref.load %{memory}[{at}] : {INDEX}")

    def store(value: str, memory: str, at: str) -> None:
        code.line(f"memref.store {value}, %{memory}[{at}] : {INDEX}")

    with code.function("sort", f"%ids: {INDEX}, %top_k: index, %experts: index, %first: {INDEX}, {SIGNATURE}"):
        zero, one, two, minus = code.index(0), code.index(1), code.index(2), code.index(-1)
        slots = code.let(f"memref.dim %ids, {zero} : {INDEX}")
        for cell in (zero, one, two):
            store(zero, "total", cell)
        with code.loop(0, "%experts", 1) as expert:
            store(zero, "first", expert.index)
        with code.loop(0, slots, 1) as slot:
            expert_id = load("ids", slot.index)
            with code.when(code.compare("ult", expert_id, "%experts")):
                store(code.add(load("first", expert_id), 1), "first", expert_id)
        with code.loop(0, "%experts", 1) as expert:
            count, row = load("first", expert.index), load("total", two)
            store(row, "first", expert.index)
            with code.when(code.compare("ne", count, 0)):
                in_lanes, rows = panels.split(code, count)
                hit = load("total", zero)
                store(expert.index, "hit_expert", hit)
                store(load("total", one), "hit_panel", hit)
                with code.loop(0, in_lanes, 2 * panels.lanes) as panel:
                    number = load("total", one)
                    store(code.add(row, panel.index), "panel_slot", number)
                    store(code.add(number, 1), "total", one)
                store(load("total", one), "hit_rows", hit)
                with code.loop(in_lanes, rows, MOST) as panel:
                    number = load("total", one)
                    store(code.add(row, panel.index), "panel_slot", number)
                    store(code.add(number, 1), "total", one)
                with code.loop(count, rows, 1) as filler:
                    store(zero, "order", code.add(row, filler.index))
                store(code.add(hit, 1), "total", zero)
                store(code.add(row, rows), "total", two)
        store(load("total", one), "hit_panel", load("total", zero))
        store(load("total", two), "panel_slot", load("total", one))
        with code.loop(0, slots, 1) as slot:
            expert_id = load("ids", slot.index)
            store(minus, "place", slot.index)
            with code.when(code.compare("ult", expert_id, "%experts")):
                row = load("first", expert_id)
                store(code.add(row, 1), "first", expert_id)
                store(code.div(slot.index, "%top_k"), "order", row)
                store(row, "place", slot.index)
