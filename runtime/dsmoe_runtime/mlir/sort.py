"""Counting sort of slots by expert, and the panels in which each expert's tokens are then multiplied.

    ids of N = T K slots       5 2 5 9 2 5           an id outside [0, E) is skipped
    count, then place          expert 2: slots 1 4    expert 5: slots 0 2 5    expert 9: slot 3
    panels of an expert        first 2 L or L tokens each (lane tiles), then groups of up to three (row tiles)

A last panel that is nearly full is filled up with copies of token 0, whose results nobody reads. One thread does this,
before the others go on: it is a few microseconds for hundreds of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir.code import Code, Value
from dsmoe_runtime.mlir.function import matrix
from dsmoe_runtime.mlir.row_tiles import MOST, split_pairs
from dsmoe_runtime.mlir.workspace import Workspace

INDEX = "memref<?xindex>"
IDS = matrix("i64")
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
NAMES, TYPES = ", ".join(f"%{name}" for name in PLAN), ", ".join([INDEX] * len(PLAN))


@dataclass(frozen=True)
class Panels:
    """Which tokens of an expert beyond whole panels of 2 L still go through lane tiles, and which through row tiles."""

    lanes: int
    from_half: int  # so many fill a panel of L
    from_whole: int  # and so many one of 2 L
    whole_from: int = 0  # below so many, there are no whole panels either

    @property
    def enter(self) -> str:
        """The function that enters an expert, by these bounds."""
        return f"enter_{self.from_half}_{self.from_whole}"

    def rows(self, code: Code, slots: str, experts: Value) -> str:
        """Rows of the workspace that may be used at most."""
        return code.add(slots, code.mul(code.least(slots, experts), 2 * self.lanes))

    def split(self, code: Code, count: str) -> tuple[str, str]:
        """Of an expert with `count` tokens: rows in lane tiles (padding included), and rows in all."""
        whole = code.down_to_multiple(count, 2 * self.lanes)
        if self.whole_from:
            whole = code.select(code.compare("ult", count, self.whole_from), 0, whole)
        rest = code.sub(count, whole)
        half = code.compare("uge", rest, self.from_half)
        filled = code.select(half, code.add(whole, self.lanes), whole)
        all_of_it = code.compare("uge", rest, self.from_whole)
        in_lanes = code.select(all_of_it, code.add(whole, 2 * self.lanes), filled)
        return in_lanes, code.most(in_lanes, count)


NEVER = 1 << 62  # so many tokens no expert has


def panels_for(element: str, transposed: bool, lanes: int, dot: bool) -> Panels:
    """Measured on AVX2; row tiles are at their best with bfloat16, and there are none for transposed weights.

    Products in pairs are twice as many for an instruction, and only row tiles have them.
    """
    if transposed:
        return Panels(lanes, 1, lanes + 1)
    if split_pairs(element) and dot:
        return Panels(lanes, NEVER, NEVER, NEVER)
    if split_pairs(element):
        return Panels(lanes, 2 * lanes, 3 * lanes // 2)
    return Panels(lanes, lanes - lanes // 8, lanes + lanes // 4)


def take_plan(code: Code, space: Workspace, label: str, panels: Panels, slots: str, experts: Value) -> str:
    """Room for a plan, each part named `%{label}_{name}` -> rows of the workspace at most."""
    rows = panels.rows(code, slots, experts)
    sizes = {
        "total": 3, "hit_expert": experts, "hit_panel": code.add(experts, 1), "hit_rows": experts,
        "panel_slot": code.add(rows, 1), "order": rows, "place": slots,
    }  # fmt: skip
    for name in PLAN:
        space.take(f"%{label}_{name}", "index", sizes[name])
    return rows


def plan_of(label: str, names: tuple[str, ...] = tuple(PLAN)) -> str:
    """The parts of a plan that were taken under a label, as arguments."""
    return ", ".join(f"%{label}_{name}" for name in names)


def _load(code: Code, memory: str, at: str) -> str:
    return code.let(f"memref.load %{memory}[{at}] : {INDEX}")


def _store(code: Code, value: str, memory: str, at: str) -> None:
    code.line(f"memref.store {value}, %{memory}[{at}] : {INDEX}")


def _enter(code: Code, panels: Panels) -> None:
    """Write `@enter_..(expert, count, PLAN)`: an expert with so many tokens, behind those that were entered before."""
    if panels.enter in code.functions:
        return
    with code.function(panels.enter, f"%expert: index, %count: index, {SIGNATURE}"):
        zero, one, two = code.index(0), code.index(1), code.index(2)
        row, hit = _load(code, "total", two), _load(code, "total", zero)
        in_lanes, rows = panels.split(code, "%count")
        _store(code, "%expert", "hit_expert", hit)
        _store(code, _load(code, "total", one), "hit_panel", hit)
        for start, stop, step in ((zero, in_lanes, 2 * panels.lanes), (in_lanes, rows, MOST)):
            if step == MOST:
                _store(code, _load(code, "total", one), "hit_rows", hit)
            with code.loop(start, stop, step) as panel:
                number = _load(code, "total", one)
                _store(code, code.add(row, panel.index), "panel_slot", number)
                _store(code, code.add(number, 1), "total", one)
        with code.loop("%count", rows, 1) as filler:
            _store(code, zero, "order", code.add(row, filler.index))
        _store(code, code.add(hit, 1), "total", zero)
        _store(code, code.add(row, rows), "total", two)
        _store(code, _load(code, "total", one), "hit_panel", _load(code, "total", zero))
        _store(code, _load(code, "total", two), "panel_slot", _load(code, "total", one))


def _empty(code: Code) -> None:
    for cell in range(3):
        _store(code, code.index(0), "total", code.index(cell))


def sort_all(code: Code, panels: Panels, label: str) -> None:
    """Write `@sort_{label}(tokens, PLAN)`: one expert that has every token, once and in order."""
    _enter(code, panels)
    with code.function(f"sort_{label}", f"%tokens: index, {SIGNATURE}"):
        _empty(code)
        code.line(f"func.call @{panels.enter}({code.index(0)}, %tokens, {NAMES}) : (index, index, {TYPES}) -> ()")
        with code.loop(0, "%tokens", 1) as token:
            _store(code, token.index, "order", token.index)
            _store(code, token.index, "place", token.index)


def sort_slots(code: Code, panels: Panels) -> None:
    """Write `@sort(ids, experts, first, PLAN)`; `first` is room for E numbers."""
    _enter(code, panels)
    with code.function("sort", f"%ids: {IDS}, %experts: index, %first: {INDEX}, {SIGNATURE}"):
        zero, minus = code.index(0), code.index(-1)
        tokens, top_k = (code.dim("%ids", axis, IDS) for axis in range(2))

        def id_of(token: str, k: str) -> str:
            return code.let(f"arith.index_cast {code.load('%ids', f'{token}, {k}', IDS)} : i64 to index")

        _empty(code)
        _store(code, zero, "hit_panel", zero)
        with code.loop(0, "%experts", 1) as expert:
            _store(code, zero, "first", expert.index)
        with code.loop(0, tokens, 1) as token, code.loop(0, top_k, 1) as k:
            expert_id = id_of(token.index, k.index)
            with code.when(code.compare("ult", expert_id, "%experts")):
                _store(code, code.add(_load(code, "first", expert_id), 1), "first", expert_id)
        with code.loop(0, "%experts", 1) as expert:
            count = _load(code, "first", expert.index)
            _store(code, _load(code, "total", code.index(2)), "first", expert.index)
            with code.when(code.compare("ne", count, 0)):
                code.line(
                    f"func.call @{panels.enter}({expert.index}, {count}, {NAMES}) : (index, index, {TYPES}) -> ()"
                )
        with code.loop(0, tokens, 1) as token, code.loop(0, top_k, 1) as k:
            expert_id = id_of(token.index, k.index)
            slot = code.add(code.mul(token.index, top_k), k.index)
            _store(code, minus, "place", slot)
            with code.when(code.compare("ult", expert_id, "%experts")):
                row = _load(code, "first", expert_id)
                _store(code, code.add(row, 1), "first", expert_id)
                _store(code, token.index, "order", row)
                _store(code, row, "place", slot)
