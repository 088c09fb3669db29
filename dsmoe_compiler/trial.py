"""Plans of the experts on trial: compiled side by side, timed in turn on cold weights, held against float64.

T tokens, H hidden size, I expert width, E experts, K experts per token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_compiler.compare.timing import captured, stopwatch
from dsmoe_runtime.agreement import row_error, within_budget
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops.mlp import mlp

if TYPE_CHECKING:
    from dsmoe_runtime.kernels.plan import Plan, Shape

COLD = 5  # times the L2 that passes before the same weights come round again
MOST_ROTATIONS, MOST_COPIES = 256, 32
SAMPLED = 8  # tokens that are computed in float64
WARM_TOKENS = 2048  # enough to compile by: beyond that the kernels do not depend on the number of tokens
COMPILERS = 16
SAMPLE_SECONDS = 2e-3  # a sample replays its graph until it is about this long
FACTOR = 4.0  # times eager's error: few rows give a rough budget, and tiles that are wrong are wrong by far more


class Weights:
    """Experts at the scale at which an answer is about 1, in as many copies as it takes to overflow the L2.

    One expert is drawn and the others are it, rolled: filling 22 GB takes a tenth of a second.
    """

    def __init__(self, shape: Shape, device: torch.device, *, l2_bytes: int, seed: int = 0) -> None:
        dtype = getattr(torch, shape.dtype)
        self.expert_bytes = 3 * shape.hidden * shape.width * dtype.itemsize
        self.experts = shape.experts
        self.copies = min(MOST_COPIES, -(-COLD * l2_bytes // (shape.experts * self.expert_bytes)))
        self.copies = max(1, self.copies)
        self.shared_copies = -(-COLD * l2_bytes // (shape.shared * self.expert_bytes)) if shape.shared else 0
        together = self.copies * shape.experts + self.shared_copies * shape.shared
        check_room(device, together * self.expert_bytes, shape)
        generator = torch.Generator(device).manual_seed(seed)

        def stacks(count: int, width: int) -> tuple[Tensor, Tensor]:
            gate_up = torch.empty(count, 2 * width, shape.hidden, dtype=dtype, device=device)
            down = torch.empty(count, shape.hidden, width, dtype=dtype, device=device)
            for stack, scale in ((gate_up, shape.hidden**-0.5), (down, (0.356 * max(1, width)) ** -0.5)):
                drawn = stack[:1].normal_(0.0, scale, generator=generator).view(-1)
                for e in range(1, count):
                    stack[e].view(-1).copy_(drawn.roll(7919 * e))
            return gate_up, down

        self.gate_up, self.down = stacks(self.copies * shape.experts, shape.width)
        self.shared_gate_up, self.shared_down = stacks(self.shared_copies, shape.shared * shape.width)

    def of(self, copy: int) -> tuple[Tensor, Tensor]:
        """gate_up `[E, 2I, H]` and down `[E, H, I]` of a copy."""
        first = copy % self.copies * self.experts
        return self.gate_up[first : first + self.experts], self.down[first : first + self.experts]

    def shared_of(self, copy: int) -> tuple[Tensor, Tensor]:
        """The shared experts' gate_up `[2 S I, H]` and down `[H, S I]`."""
        return self.shared_gate_up[copy % self.shared_copies], self.shared_down[copy % self.shared_copies]


class Trial:
    """One number of tokens on some weights: inputs that rotate, a graph for each plan, and the exact answer."""

    def __init__(self, shape: Shape, weights: Weights, *, l2_bytes: int, seed: int = 0) -> None:
        from dsmoe_runtime.kernels.cost import distinct
        from dsmoe_runtime.kernels.experts import Weights as Arguments
        from dsmoe_runtime.kernels.moe import sliced

        self.shape, self.device = shape, weights.gate_up.device
        touched = (distinct(shape) + shape.shared) * weights.expert_bytes
        rotations = min(MOST_ROTATIONS, max(2, weights.copies, -(-COLD * l2_bytes // int(touched))))
        dtype = weights.gate_up.dtype
        slots_bytes = 3 * shape.tokens * shape.top_k * (shape.hidden + shape.width) * dtype.itemsize
        check_room(self.device, slots_bytes + 2 * shape.tokens * shape.hidden * dtype.itemsize, shape)
        generator = torch.Generator(self.device).manual_seed(seed)
        self.x = [
            torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=self.device, generator=generator)
            for _ in range(2)
        ]
        self.ids = routings(shape, rotations, generator)
        noise = torch.rand(shape.tokens, shape.top_k, device=self.device, generator=generator) + 0.5
        self.weights_TK = noise / noise.norm(dim=-1, keepdim=True)
        self.stacks = [weights.of(r) for r in range(rotations)]
        self.arguments = [Arguments.of(*s, None, None, "silu", 1.0, 1.0, "concat") for s in self.stacks]
        if shape.shared:
            self.arguments = [sliced(w, *weights.shared_of(r)) for r, w in enumerate(self.arguments)]
        self.pool: Any = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._graphs: dict[Plan, torch.cuda.CUDAGraph] = {}
        self._rounds: dict[Plan, int] = {}
        self._reference: tuple[Tensor, Tensor] | None = None

    def call(self, plan: Plan, rotation: int = 0, tokens: int | None = None) -> Tensor:
        """`y [T, H]`, launched as it is."""
        from dsmoe_runtime.kernels.moe import answer

        x, ids = self.x[rotation % len(self.x)][:tokens], self.ids[rotation][:tokens]
        return answer(x, ids, self.weights_TK[:tokens], self.arguments[rotation], plan)

    def warm(self, plans: Sequence[Plan]) -> dict[Plan, str]:
        """Compile the kernels of all plans at a time; those that cannot be, with the reason."""

        def once(plan: Plan) -> str | None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            try:
                self.call(plan, tokens=WARM_TOKENS)
            except Exception as error:  # what a compiler may say is not for us to list
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return None

        threads = min(COMPILERS, os.cpu_count() or 1) if self.device.type == "cuda" else 1
        with ThreadPoolExecutor(threads) as pool:
            failures = dict(zip(plans, pool.map(once, plans), strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {plan: reason for plan, reason in failures.items() if reason}

    def seconds(self, plan: Plan) -> float:
        """Seconds a call, the mean over rounds of all rotations; replayed from a graph on a GPU."""
        if self.device.type != "cuda":
            return stopwatch(lambda: self._round(plan), self.device) / len(self.ids)
        if plan not in self._graphs:
            graph = self._graphs[plan] = self._capture(plan)
            self._rounds[plan] = max(1, round(SAMPLE_SECONDS / stopwatch(graph.replay, self.device)))
        graph, rounds = self._graphs[plan], self._rounds[plan]

        def replay() -> None:
            for _ in range(rounds):
                graph.replay()

        return stopwatch(replay, self.device) / (rounds * len(self.ids))

    def _round(self, plan: Plan) -> None:
        for rotation in range(len(self.ids)):
            self.call(plan, rotation)

    def _capture(self, plan: Plan) -> torch.cuda.CUDAGraph:
        # One pool for all: graphs overwrite each other's intermediates, which none of them reads from another.
        graph: torch.cuda.CUDAGraph = captured(
            lambda: self._round(plan), self.device, warm=lambda: self.call(plan), pool=self.pool
        )
        graph.replay()
        return graph

    def forget(self, plan: Plan) -> None:
        """Give up a plan's graph."""
        self._graphs.pop(plan, None)

    def disagreement(self, plan: Plan, incumbent: Plan) -> str | None:
        """Why the plan's answer is not good enough, or None: some rows against float64, all against the incumbent's."""
        sample = torch.linspace(0, self.shape.tokens - 1, min(SAMPLED, self.shape.tokens), device=self.device).long()
        if self._reference is None:
            dtype = self.x[0].dtype
            self._reference = self._rows(sample, dtype), self._rows(sample, torch.float64)
        eager, exact = self._reference
        y = self.call(plan)
        verdict = within_budget(y[sample], eager=eager, exact=exact, factor=FACTOR)
        if not verdict.ok:
            return f"against float64: {verdict}"
        if plan == incumbent:
            return None
        apart = float(row_error(y, self.call(incumbent)).max())
        most = 2 * FACTOR * float(row_error(eager, exact).max()) + torch.finfo(y.dtype).eps
        return None if apart <= most else f"a row is {apart:.2e} from the incumbent's, more than {most:.2e}"

    def _rows(self, sample: Tensor, dtype: torch.dtype) -> Tensor:
        """`[S, H]`: the sampled tokens of the first rotation in `dtype`, expert by expert in plain torch."""
        ids, weights = self.ids[0][sample], self.weights_TK[sample]
        gate_up, down = self.stacks[0]
        wide = torch.promote_types(dtype, torch.float32)
        answers = torch.zeros(*ids.shape, self.shape.hidden, dtype=wide, device=self.device)
        for expert in ids.unique().tolist():
            rows, slots = torch.where(ids == expert)
            x = self.x[0][sample[rows]].to(dtype)
            stack = gate_up[expert].to(dtype), down[expert].to(dtype)
            answers[rows, slots] = mlp(x, *stack, None, None, "silu", 1.0, 1.0, False).to(wide)
        total = (answers * weights[..., None].to(wide)).sum(1)
        w = self.arguments[0]
        if w.shared_gate_up is not None and w.shared_down is not None:
            x, shared = self.x[0][sample].to(dtype), (w.shared_gate_up.to(dtype), w.shared_down.to(dtype))
            total += mlp(x, *shared, None, None, "silu", 1.0, 1.0, False).to(wide)
        return total.to(dtype)


def routings(shape: Shape, rotations: int, generator: torch.Generator) -> list[Tensor]:
    """`[T, K]` uniform experts for each rotation, distinct within a token; a lone one takes none of the last's."""
    slots, drawn = shape.tokens * shape.top_k, []
    left = torch.empty(0, dtype=torch.long, device=generator.device)
    for _ in range(rotations):
        if shape.tokens > 1:
            noise = torch.rand(shape.tokens, shape.experts, generator=generator, device=generator.device)
            drawn.append(noise.topk(shape.top_k, dim=-1).indices)
            continue
        if len(left) < slots:
            left = torch.randperm(shape.experts, generator=generator, device=generator.device)
        drawn.append(left[:slots].view(shape.tokens, shape.top_k))
        left = left[slots:]
    return drawn


def check_room(device: torch.device, needed: int, shape: Shape) -> None:
    """Raises: TargetError, if the GPU has not so much memory free."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    if needed > 0.9 * free:
        raise TargetError(
            f"{shape}: tuning needs {needed / 2**30:.1f} GiB more on the GPU, {free / 2**30:.1f} are free; "
            "tune fewer --tokens, or on a larger GPU"
        )
