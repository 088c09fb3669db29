"""Scaled dot-product attention lowered: softmax(q k^T scale + mask) v, with grouped heads and a cache of any fill.

before
    %y = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, ...

after
    @attention(q, k, v, mask?, y)        workspace
      @work: on each thread
        what each row of the mask shows  a tail of slots that is hidden is never read
        @attend_few | @attend_many       (batch, head of keys, block of up to 8 L queries) -> y

q [B, Hq, S, D], k [B, Hkv, C, D], v [B, Hkv, C, Dv] in any strides but the last; Hq / Hkv heads share keys and values.
Softmax is float32, and a query that sees nothing gets 0, as in torch.
"""

from __future__ import annotations

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.attention_few import attend_few
from dsmoe_runtime.mlir.attention_many import attend_many
from dsmoe_runtime.mlir.attention_place import HIDDEN, PANELS, AttentionSpec, Sizes
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.formats import widen_scalar
from dsmoe_runtime.mlir.function import Function, symbol
from dsmoe_runtime.mlir.row_tiles import MOST
from dsmoe_runtime.mlir.sort import INDEX
from dsmoe_runtime.mlir.workspace import Workspace

PHASES = ("thread", "mask", "attend")  # each has a counter


def attention_function(spec: AttentionSpec) -> Function:
    """`@attention(q, k, v, mask [B | 1, Hq | 1, S | 1, C]?, y)`."""
    name = symbol("attention", spec)
    code = Code(name)
    attend_few(code, spec)
    if not spec.few:
        attend_many(code, spec)
    shared = [*spec.handed(), ("%counters", team.COUNTERS)]
    with code.function("work", ", ".join(f"{n}: {kind}" for n, kind in shared)):
        _work(code, spec)
    team.team(code, "work", shared)
    with code.public(name, ", ".join(f"{n}: {kind}" for n, kind in spec.arguments())):
        sizes = Sizes(code, spec)
        rows = code.mul(code.mul(sizes.batch, sizes.heads), sizes.queries)
        with code.when(code.compare("ne", code.mul(rows, sizes.width), 0)):
            _host(code, spec, sizes, rows, shared)
    return Function(name, code.text(), tuple(kind for _, kind in spec.arguments()))


def _work(code: Code, spec: AttentionSpec) -> None:
    sizes = Sizes(code, spec)
    thread = team.claim(code, PHASES.index("thread"))
    mine = code.mul(thread, sizes.scratch)
    if spec.has_mask:
        dims = [code.dim("%mask", axis, spec.mask_kind) for axis in range(3)]
        with team.claimed(code, PHASES.index("mask"), code.mul(code.mul(dims[0], dims[1]), dims[2])) as row:
            place, rest = code.rem(row, dims[2]), code.div(row, dims[2])
            _see(code, spec, sizes, row, f"{code.div(rest, dims[1])}, {code.rem(rest, dims[1])}, {place}")
        team.barrier(code)
    step = 2 * spec.lanes * PANELS
    parts = code.div_up(sizes.of_kv_head, step)
    items = code.mul(code.mul(sizes.batch, sizes.kv_heads), parts)
    with team.claimed(code, PHASES.index("attend"), items) as item:
        # The last queries of a causal mask see the most: they come first.
        part, rest = code.sub(code.sub(parts, code.rem(item, parts)), 1), code.div(item, parts)
        batch, head = code.div(rest, sizes.kv_heads), code.rem(rest, sizes.kv_heads)
        begin = code.mul(part, step)
        count = code.least(code.sub(sizes.of_kv_head, begin), step)
        names, kinds = (", ".join(side) for side in zip(*spec.handed(), strict=True))
        for which, condition in (("few", "ule"),) if spec.few else (("few", "ule"), ("many", "ugt")):
            with code.when(code.compare(condition, count, MOST)):
                code.line(
                    f"func.call @attend_{which}({batch}, {head}, {begin}, {count}, {mine}, {names}) : "
                    f"(index, index, index, index, index, {kinds}) -> ()"
                )


def _see(code: Code, spec: AttentionSpec, sizes: Sizes, row: str, at: str) -> None:
    """first[row], end[row]: where the mask first does something, and where it begins to hide all."""
    kind = spec.mask_kind

    def scan(start: str, forward: bool) -> str:
        """From `start`, on while slots are plain, or back while they are hidden."""
        result, place = code.name("at"), code.name("at")
        with code.region(f"{result} = scf.while ({place} = {start}) : (index) -> index", tail=None):
            inside = code.compare("ult", place, sizes.slots) if forward else code.compare("ugt", place, 0)
            here = code.name("more")
            with code.region(f"{here} = scf.if {inside} -> (i1)", tail=None):
                value = code.load("%mask", f"{at}, {place if forward else code.sub(place, 1)}", kind)
                if spec.mask == "i1":
                    yes = code.let("arith.constant true", "k")
                    more = value if forward else code.let(f"arith.xori {value}, {yes} : i1")
                else:
                    wide = widen_scalar(code, value, spec.mask)
                    plain, hidden = code.constant(0.0, "f32"), code.constant(HIDDEN, "f32")
                    test = f"oeq, {wide}, {plain}" if forward else f"ole, {wide}, {hidden}"
                    more = code.let(f"arith.cmpf {test} : f32")
                code.line(f"scf.yield {more} : i1")
            with code.region("} else"):
                no = code.let("arith.constant false", "k")
                code.line(f"scf.yield {no} : i1")
            code.line(f"scf.condition({here}) {place} : index")
        with code.region("} do"):
            index = code.name("at")
            code.line(f"^bb0({index}: index):")
            code.line(f"scf.yield {code.add(index, 1) if forward else code.sub(index, 1)} : index")
        return result

    end = scan(sizes.slots, forward=False)
    if spec.mask != "i1":  # a row that hides all by a finite number still has a softmax
        end = code.select(code.compare("eq", end, 0), sizes.slots, end)
    first = code.least(scan(code.index(0), forward=True), end)
    code.line(f"memref.store {first}, %mask_first[{row}] : {INDEX}")
    code.line(f"memref.store {end}, %mask_end[{row}] : {INDEX}")


def _host(code: Code, spec: AttentionSpec, sizes: Sizes, rows: str, shared: team.Arguments) -> None:
    products = code.mul(code.mul(rows, sizes.slots), code.add(sizes.depth, sizes.width))
    threads = team.threads_for(code, products)
    space = Workspace(code)
    space.take("%counters", "i64", len(PHASES) * team.COUNTER_SPACING)
    if spec.has_mask:
        dims = [code.dim("%mask", axis, spec.mask_kind) for axis in range(3)]
        count = code.mul(code.mul(dims[0], dims[1]), dims[2])
        space.take("%mask_first", "index", count)
        space.take("%mask_end", "index", count)
    space.take("%scratch", "f32", code.mul(threads, sizes.scratch))
    space.allocate()
    team.reset(code, "%counters", len(PHASES))
    team.run(code, "work", shared, threads)
    space.release()
