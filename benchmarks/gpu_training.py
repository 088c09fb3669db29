"""A training step of deepseek-moe-16b's routed experts on one H200, bf16: forward and backward, in CUDA graphs.

    python -m benchmarks.gpu_training
    python -m benchmarks.gpu_training --tokens 4096 --candidates dsmoe

Gradients for x, the routing weights and both stacks of expert weights. TFLOP/s count thrice the forward's products.
Before a candidate is timed, sampled rows of y, dx and dw, and sampled experts' gradients, agree with float64. Kept too:
the memory between forward and backward, and whether repeated runs give the same bits. Where a step cannot be captured
it is timed as it is. Results: benchmarks/results/gpu_training_h200.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import gpu_candidates as candidates
from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.gpu_timing import (
    Deadline,
    Replay,
    Session,
    alive,
    failure,
    interleave,
    parsed,
    parser,
    poison,
    release,
    summary,
    tell,
    told,
)
from dsmoe_runtime.agreement import within_budget

DTYPE = torch.bfloat16
ROWS, EXPERTS = 32, 2  # sampled for agreement
GOALS = {4096: (450.0, 423.0), 16384: (540.0, 518.0)}  # TFLOP/s: goal, best peer, for the 16B's shape


class Step:
    """One forward and backward on fixed inputs; the same tensors for all candidates."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device) -> None:
        self.shape, self.tokens, self.device = shape, tokens, device
        generator = torch.Generator(device).manual_seed(tokens)
        self.x = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(DTYPE).requires_grad_()
        self.ids = candidates.uniform(tokens, shape.experts, shape.top_k, generator)
        self.weights = candidates.routing_weights(self.ids, generator).requires_grad_()
        sizes = (shape.experts, shape.hidden, shape.width)
        stacks = candidates.weight_stacks(*sizes, dtype=DTYPE, generator=generator)
        self.gate_up, self.down = (stack.requires_grad_() for stack in stacks)
        self.grad = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(DTYPE)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.weights, self.gate_up, self.down)

    def forward(self, function: candidates.Experts) -> Tensor:
        return function(self.x, self.ids, self.weights, self.gate_up, self.down)

    def run(self, function: candidates.Experts) -> tuple[Tensor, ...]:
        """y and the gradients of the leaves."""
        y = self.forward(function)
        return (y.detach(), *torch.autograd.grad(y, self.leaves, self.grad))

    def flop(self) -> float:
        return 3 * self.shape.flop(self.tokens)


class Reference:
    """Rows of y, dx and dw for some tokens, and both weights' gradients for some experts, in float64 and bf16."""

    def __init__(self, step: Step) -> None:
        self.rows = torch.linspace(0, step.tokens - 1, min(step.tokens, ROWS), device=step.device).long()
        self.experts = [0, step.shape.experts - 1][:EXPERTS]
        self.exact, self.eager = (self.of(step, dtype) for dtype in (torch.float64, DTYPE))

    def of(self, step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
        """By the oracle's operations in `dtype`."""
        x = step.x.detach()[self.rows].to(dtype).requires_grad_()
        weights = step.weights.detach()[self.rows].requires_grad_()
        y = candidates.loop(x, step.ids[self.rows], weights, step.gate_up.detach(), step.down.detach(), dtype)
        dx, dw = torch.autograd.grad(y, (x, weights), step.grad[self.rows].to(dtype))
        found = {"y": y.detach(), "x": dx, "weights": dw.reshape(1, -1)}  # dw by the sample: one slot's may cancel out
        wide = torch.promote_types(dtype, torch.float32)
        for number in self.experts:
            rows, slots = torch.where(step.ids == number)
            stacks = [stack.detach()[number].to(dtype).requires_grad_() for stack in (step.gate_up, step.down)]
            answer = candidates.expert(step.x.detach()[rows].to(dtype), *stacks)
            part = answer.to(wide) * step.weights.detach()[rows, slots, None].to(wide)
            grads = torch.autograd.grad(part, stacks, step.grad[rows].to(wide))
            found |= {f"gate_up {number}": grads[0], f"down {number}": grads[1]}
        return found

    def verdicts(self, outputs: tuple[Tensor, ...]) -> dict[str, Any]:
        """One verdict for y and each gradient; bf16 sets the budget."""
        y, dx, dw, d_gate_up, d_down = outputs
        actual = {"y": y[self.rows], "x": dx[self.rows], "weights": dw[self.rows].reshape(1, -1)}
        for number in self.experts:
            actual |= {f"gate_up {number}": d_gate_up[number], f"down {number}": d_down[number]}
        finite = all(bool(output.isfinite().all()) for output in outputs)
        verdicts: dict[str, Any] = {"ok": finite, "all_finite": finite}
        for name, value in actual.items():
            eager = self.eager[name].to(value.dtype)
            found = within_budget(value, eager=eager, exact=self.exact[name])
            verdicts[name] = {"ok": found.ok, "worst": found.worst, "budget": found.budget, "rows": found.rows}
            verdicts["ok"] &= found.ok
        return verdicts


def saved_bytes(step: Step, function: candidates.Experts) -> dict[str, int]:
    """Bytes of activations kept for the backward (inputs and weights apart), and the peak of a whole step."""
    own = {leaf.untyped_storage().data_ptr() for leaf in (*step.leaves, step.ids)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step.forward(function)
    found = {"saved_bytes": sum(kept.values())}
    del y
    if step.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.run(function)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def same_bits(step: Step, function: candidates.Experts, forwards: int, steps: int) -> dict[str, Any]:
    """Whether so many forwards, and so many whole steps, all gave the bits of the first."""
    with torch.no_grad():
        first = step.forward(function)
        forward = all(torch.equal(step.forward(function), first) for _ in range(forwards - 1))
    once = step.run(function)
    backward = all(
        all(torch.equal(a, b) for a, b in zip(step.run(function), once, strict=True)) for _ in range(steps - 1)
    )
    return {"forward_runs": forwards, "forward_same": forward, "step_runs": steps, "step_same": backward}


def functions(shape: Shape, *, compiled: bool) -> dict[str, Callable[[], candidates.Experts]]:
    """How each candidate is made."""

    def stock(function: candidates.Experts) -> candidates.Experts:
        return torch.compile(function, dynamic=False) if compiled else function

    sizes = (shape.experts, shape.hidden, shape.width)
    return {
        "dsmoe": lambda: candidates.dsmoe,
        "grouped_mm": lambda: stock(candidates.grouped_mm),
        "transformers grouped_mm": lambda: stock(candidates.transformers_experts("grouped_mm", *sizes)),
    }


def prepare(
    step: Step, reference: Reference, function: candidates.Experts, entry: dict[str, Any], arguments: Any
) -> Replay | None:
    """Compile, compare, look at memory and bits, capture: what to time, or None where it disagrees."""
    start = time.perf_counter()
    step.run(function)
    entry["first_call_seconds"] = round(time.perf_counter() - start, 2)
    slots, hidden = step.ids.numel(), 2 * step.x.numel()
    sizes = (hidden, 2 * slots * step.shape.width, 4 * slots * step.shape.width, 2 * slots * step.shape.hidden)
    poison(step.device, *sizes, 2 * step.gate_up.numel(), 2 * step.down.numel())
    entry["agreement"] = reference.verdicts(step.run(function))
    entry |= saved_bytes(step, function)
    entry["repeatable"] = same_bits(step, function, arguments.forwards, arguments.steps)
    if not entry["agreement"]["ok"] and not arguments.disagreeing:
        return None
    try:
        replay = Replay([lambda: step.run(function)], step.device)
        entry["graph"] = replay.graph is not None
    except Exception as error:  # then it is timed as it is
        entry["graph"], entry["capture_error"] = False, failure(error)
        replay = Replay([lambda: step.run(function)], step.device, graph=False)
    return replay


def run_cell(session: Session, name: str, tokens: int, share: float) -> dict[str, Any]:
    """All candidates for one number of tokens."""
    start, deadline, arguments, shape = time.perf_counter(), Deadline(share), session.arguments, SHAPES[name]
    step = Step(shape, tokens, session.device)
    record: dict[str, Any] = {"shape": name, "tokens": tokens, "flop": step.flop(), "candidates": {}}
    if name == "16B" and tokens in GOALS:
        record["goal_tflop_per_second"], record["best_peer_tflop_per_second"] = GOALS[tokens]
    replays: dict[str, Replay] = {}
    try:
        reference = Reference(step)
        slowest = 0.0
        for candidate, make in functions(shape, compiled=arguments.compile).items():
            if arguments.candidates and candidate not in arguments.candidates:
                continue
            entry: dict[str, Any] = {}
            record["candidates"][candidate] = entry
            if candidate != "dsmoe" and deadline.left < slowest:
                entry["skipped"] = "the budget"
                continue
            before = time.perf_counter()
            try:
                replay = prepare(step, reference, make(), entry, arguments)
                if replay is not None:
                    replays[candidate] = replay
            except Exception as error:  # one candidate's failure must not cost the others their measurement
                entry["error"] = failure(error)
            if not alive(session.device):
                return record
            slowest = max(slowest, time.perf_counter() - before) if candidate != "dsmoe" else 0.0
        for candidate, seconds in interleave(replays, arguments.repeats).items():
            entry = record["candidates"][candidate]
            entry |= summary(seconds)
            entry["tflop_per_second"] = record["flop"] / entry["median_us"] / 1e6
    except Exception as error:
        record["error"] = failure(error)
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def main() -> int:
    made = parser(__doc__ or "", budget=150)
    made.add_argument("--shapes", nargs="+", default=["16B"], choices=SHAPES)
    made.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    made.add_argument("--forwards", type=int, default=100, help="forwards that must give the same bits")
    made.add_argument("--steps", type=int, default=10, help="whole steps that must give the same bits")
    arguments = parsed(made)
    F.silu(torch.zeros(1, requires_grad=True)).backward()  # the engine's thread, started outside any capture
    session = Session("gpu_training", arguments, ("shape", "tokens"))
    session.record["dtype"] = str(DTYPE)[6:]
    plan = [(shape, tokens) for shape in arguments.shapes for tokens in arguments.tokens]
    plan = [cell for cell in plan if cell not in session.done]
    for index, (name, tokens) in enumerate(plan):
        cell = run_cell(session, name, tokens, session.deadline.left / (len(plan) - index))
        session.keep(cell)
        for candidate, entry in cell["candidates"].items():
            timed = "median_us" in entry
            what = f"{entry['median_us']:.0f} us, {entry['tflop_per_second']:.0f} TFLOP/s" if timed else str(entry)
            kept = f", keeps {entry['saved_bytes'] / 2**20:.0f} MiB" if "saved_bytes" in entry else ""
            tell(f"{name} T={tokens:<5} {candidate:24} {what}{kept} {entry.get('repeatable', '')}")
        if not alive(session.device):
            return session.restart()
        release(session.device)
    told(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
