"""nn.Linear lowered: y = x w^T + bias, from one token, at the speed of memory, to many, at that of the register tiles.

before
    %y = torch.aten.linear %x, %w, %bias

after
    @linear(x, w, bias?, y)    plan of all tokens; few tokens are gathered here, before there are threads
      @work: on each thread      @gather panels of x                     many tokens only
                                 @linear_item (rows of w, tokens)        products, rounded once -> y
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_runtime.mlir import team
from dsmoe_runtime.mlir.batch import Batch, as_row, as_stack
from dsmoe_runtime.mlir.code import Code
from dsmoe_runtime.mlir.function import Function, matrix, symbol
from dsmoe_runtime.mlir.gather import FLAT
from dsmoe_runtime.mlir.levels import Level
from dsmoe_runtime.mlir.linear_item import linear_item
from dsmoe_runtime.mlir.products import Product, scratch_size, tiles
from dsmoe_runtime.mlir.weights import Stack
from dsmoe_runtime.mlir.workspace import Workspace

PHASES = ("thread", "gather", "products")  # each has a counter


@dataclass(frozen=True)
class LinearSpec:
    """All that the code depends on; sizes are not among it."""

    element: str  # of x and w
    output: str  # of y
    bias: str | None  # its element
    level: Level

    @property
    def product(self) -> Product:
        return Product(Stack(self.element, False), self.bias, self.level)

    @property
    def batch(self) -> Batch:
        return Batch("all", self.element, self.element, self.level.lanes, self.level.dot)


def linear_function(spec: LinearSpec) -> Function:
    """`@linear(x [M, K], w [N, K], bias [N]?, y [M, N])`."""
    name = symbol("linear", spec)
    code, batch, product = Code(name, dot=spec.level.dot), spec.batch, spec.product
    tiles(code, product)
    batch.helpers(code)
    linear_item(code, product, "item", spec.output)
    arguments = [("%x", matrix(spec.element)), ("%w", matrix(spec.element)), ("%y", matrix(spec.output))]
    if spec.bias:
        arguments.insert(2, ("%bias", matrix(spec.bias, 1)))
    shared = [
        ("%x", matrix(spec.element)), ("%w3", product.stack.kind),
        *([("%bias2", product.bias_kind)] if spec.bias else []), ("%y", matrix(spec.output)),
        *batch.arguments, ("%scratch", FLAT), ("%threads", "index"), ("%counters", team.COUNTERS),
    ]  # fmt: skip
    with code.function("work", ", ".join(f"{n}: {kind}" for n, kind in shared)):
        thread = team.claim(code, PHASES.index("thread"))
        with code.when(code.compare("ugt", code.load("%all_hit_panel", code.index(1), "memref<?xindex>"), 1)):
            batch.gather(code, PHASES.index("gather"), "%x")
            team.barrier(code)
        own = f"%scratch, {code.mul(thread, scratch_size(spec.level.lanes))}"
        batch.products(
            code, PHASES.index("products"), product, "item", "%w3", "%bias2" if spec.bias else None,
            ("%y", spec.output), own, "%threads",
        )  # fmt: skip
    team.team(code, "work", shared)
    with code.public(name, ", ".join(f"{n}: {kind}" for n, kind in arguments)):
        _host(code, spec, shared)
    return Function(name, code.text(), tuple(kind for _, kind in arguments))


def _host(code: Code, spec: LinearSpec, shared: team.Arguments) -> None:
    y, batch = matrix(spec.output), spec.batch
    tokens, height = (code.dim("%y", axis, y) for axis in range(2))
    size = code.dim("%x", 1, matrix(spec.element))
    outputs = code.mul(tokens, height)
    with code.when(code.compare("ne", outputs, 0)):
        threads = team.threads_for(code, code.mul(outputs, size))
        code.line(f"%threads = arith.addi {threads}, {code.index(0)} : index")
        as_stack(code, "%w", spec.element, "%w3")
        if spec.bias:
            as_row(code, "%bias", spec.bias, "%bias2")
        space = Workspace(code)
        space.take("%counters", "i64", len(PHASES) * team.COUNTER_SPACING)
        batch.take(code, space, tokens, size)
        space.take("%scratch", "f32", code.mul("%threads", scratch_size(spec.level.lanes)))
        space.allocate()
        team.reset(code, "%counters", len(PHASES))
        batch.sort(code, tokens)
        with code.when(code.compare("eq", code.load("%all_hit_panel", code.index(1), "memref<?xindex>"), 1)):
            batch.gather(code, PHASES.index("gather"), "%x")
        team.run(code, "work", shared, "%threads")
        space.release()
