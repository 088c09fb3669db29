"""Whole models on one H200, bf16, random weights: prefill and decode in CUDA graphs, and the time to a first token.

    python -m benchmarks.gpu_model                                  deepseek-moe-16b, then llama2-7b
    python -m benchmarks.gpu_model --shapes deepseek-moe-16b --cells prefill:4096 decode:1 --candidates dsmoe
    python -m benchmarks.gpu_model --measure compile                cold and warm caches, in processes of their own

Prefill reads one prompt; decode adds a token to each of B sequences behind --context positions. Ours is captured, fused
and compiled by Inductor for these sizes. Beside it: the eager reference (its loop waits for the host: no graph), and
transformers' model of the same architecture with its expert back ends, eager in a graph and compiled. Stock
torch.compile of the reference is left out: its loops break the graph at every expert. Agreement is judged against
float32 with the candidate's own experts. Results: benchmarks/results/gpu_model_h200.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_model_candidates as candidates
from benchmarks.gpu_compile import measure_compile, once
from benchmarks.gpu_model_candidates import Answer, Call, Exact, HuggingFace, Ours, Problem
from benchmarks.gpu_timing import (
    BANDWIDTH,
    MATRIX_RATE,
    Deadline,
    Replay,
    Session,
    alive,
    failure,
    interleave,
    parsed,
    parser,
    release,
    summary,
    tell,
    told,
)
from dsmoe_model.accounting import account
from dsmoe_model.config import ModelConfig
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.agreement import within_budget

CELLS = ("prefill:512", "prefill:4096", "decode:1", "decode:8", "decode:64")
COMPILE_SECONDS = 45  # what is set aside for stock torch.compile of a whole model
GATHER_LIMIT = 8e9  # bytes of weights that transformers' batched_mm may copy in a layer
NAMES = ("dsmoe", "eager", "transformers grouped_mm", "transformers batched_mm", "transformers grouped_mm compiled")


def decode_bytes(config: ModelConfig, batch: int, context: int, experts: Tensor) -> float:
    """What a step must read: the experts that were hit, all other weights but the embedding, keys and values."""
    counted, of_expert = account(config), 3 * config.hidden_size * config.moe_intermediate_size
    hit = sum(layer.unique().numel() for layer in experts)
    others = counted.attention + counted.dense + counted.shared_experts + counted.router + counted.norm
    head = config.vocab_size * config.hidden_size
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (context + 1) * batch
    return 2.0 * (hit * of_expert + others + head + batch * config.hidden_size + cache)


def prefill_flop(config: ModelConfig, tokens: int) -> float:
    """Products of a prompt: activated weights, the causal half of attention, the head for the last position."""
    counted = account(config)
    linear = counted.attention + counted.dense + counted.activated_experts + counted.router
    heads = config.num_attention_heads * config.head_dim
    attention = 2.0 * config.num_hidden_layers * heads * tokens**2
    return 2.0 * linear * tokens + attention + 2.0 * config.vocab_size * config.hidden_size


class Cell:
    """One model, phase and size: candidates prepared one by one, then timed in turn."""

    def __init__(self, session: Session, name: str, model: Transformer, cell: str, exact: Exact | None) -> None:
        self.session, self.model, self.exact = session, model, exact
        phase, _, size = cell.partition(":")
        context = session.arguments.context
        self.problem: Problem = candidates.make_problem(model, phase, int(size), context)
        self.record: dict[str, Any] = {"preset": name, "phase": phase, "size": int(size), "candidates": {}}
        self.record["context"] = context if phase == "decode" else 0
        self.replays: dict[str, Replay] = {}
        self.eager: Answer | None = None
        self.exact_eager: Tensor | None = None

    def reference(self) -> None:
        """The eager answer and, with a float32 model, what it should have been: the budget of the others."""
        self.eager = candidates.reference(self.model, self.problem)
        self.bound(self.eager[1])
        if self.exact is not None and self.eager[1] is not None:
            self.exact_eager = self.exact.logits(self.problem, self.eager[1])

    def bound(self, experts: Tensor | None) -> None:
        """The least time of the cell, by the experts that eager hit."""
        config, tokens = self.model.config, self.problem.tokens
        assert experts is not None
        if self.problem.phase == "prefill":
            self.record["flop"] = prefill_flop(config, tokens)
            self.record["bound_us"] = 1e6 * self.record["flop"] / MATRIX_RATE
        else:
            self.record["bytes"] = decode_bytes(config, tokens, self.record["context"], experts)
            self.record["bound_us"] = 1e6 * self.record["bytes"] / BANDWIDTH
            self.record["experts_hit"] = [layer.unique().numel() for layer in experts]

    def verdict(self, answer: Answer) -> dict[str, Any]:
        """Logits within the budget that eager sets, each against float32 with its own experts."""
        logits, experts = answer
        assert self.eager is not None
        eager, chosen = self.eager
        finite = bool(logits.isfinite().all())
        facts: dict[str, Any] = {"all_finite": finite}
        facts["same_greedy_token"] = int((logits.argmax(-1) == eager.argmax(-1)).sum())
        if self.exact is None or experts is None:
            size = eager.norm(dim=-1)
            facts |= {"ok": finite, "from_eager": float(((logits.float() - eager).norm(dim=-1) / size).max())}
            return facts
        exact = self.exact.logits(self.problem, experts)
        found = within_budget(logits.float(), eager=eager.float(), exact=exact, exact_eager=self.exact_eager)
        differ = 0
        if chosen is not None and chosen.numel():
            differ = int((experts.sort(-1).values != chosen.sort(-1).values).any(-1).sum())
        return facts | {
            "ok": found.ok and finite,
            "worst": found.worst,
            "budget": found.budget,
            "rows": found.rows,
            "tokens_with_other_experts": differ,
        }

    def prepare(self, name: str, make: Callable[[dict[str, Any]], tuple[Call, Answer]], graph: bool) -> None:
        """Compile, compare, capture; where the capture is refused, the calls are timed as they are."""
        start, entry = time.perf_counter(), dict[str, Any]()
        self.record["candidates"][name] = entry
        try:
            call, answer = make(entry)
            entry["first_call_seconds"] = round(time.perf_counter() - start, 2)
            entry["agreement"] = self.verdict(answer)
            if not entry["agreement"]["ok"] and not self.session.arguments.disagreeing:
                return
            try:
                replay = Replay([call], self.session.device, graph=graph)
            except Exception as error:
                entry["capture_error"] = failure(error)
                replay = Replay([call], self.session.device, graph=False)
            entry["graph"] = replay.graph is not None
            self.replays[name] = replay
        except Exception as error:  # one candidate's failure must not cost the others their measurement
            entry["error"] = failure(error)

    def measure(self, repeats: int) -> None:
        """The eager reference apart, twice: it takes most of a second."""
        slow = {name: self.replays.pop(name) for name in ("eager",) if name in self.replays}
        taken = interleave(self.replays, repeats)
        taken |= {name: [replay.seconds() for _ in range(2)] for name, replay in slow.items()}
        for name, seconds in taken.items():
            entry = self.record["candidates"][name]
            entry |= summary(seconds)
            entry["tokens_per_second"] = 1e6 * self.problem.tokens / entry["median_us"]
            entry["share_of_bound"] = self.record["bound_us"] / entry["median_us"]


def makers(cell: Cell, ours: Ours, huggingface: dict[str, HuggingFace]) -> dict[str, Any]:
    """How each candidate is made: its call, and its first answer with the experts that it chose."""
    problem, config = cell.problem, cell.model.config

    def dsmoe(entry: dict[str, Any]) -> tuple[Call, Answer]:
        call = ours.call(problem)
        entry |= {f"{step}_seconds": round(seconds, 2) for step, seconds in ours.seconds.items()}
        return call, call()

    def eager(_: dict[str, Any]) -> tuple[Call, Answer]:
        assert cell.eager is not None
        return lambda: candidates.reference(cell.model, problem), cell.eager

    def theirs(implementation: str, compiled: bool) -> tuple[Call, Answer]:
        if implementation not in huggingface:
            huggingface[implementation] = HuggingFace(cell.model, implementation)
        model = huggingface[implementation]
        call = model.call(problem, compiled=compiled)
        return call, call() if compiled else model.watched(call)

    made: dict[str, Any] = {"dsmoe": dsmoe, "eager": eager}
    if config.n_routed_experts:
        made["transformers grouped_mm"] = lambda _: theirs("grouped_mm", False)
        gathered = problem.tokens * config.num_experts_per_tok * 6 * config.hidden_size * config.moe_intermediate_size
        if gathered <= GATHER_LIMIT:
            made["transformers batched_mm"] = lambda _: theirs("batched_mm", False)
        if cell.session.arguments.compile:
            made["transformers grouped_mm compiled"] = lambda _: theirs("grouped_mm", True)
    return made


def run_cell(cell: Cell, ours: Ours, huggingface: dict[str, HuggingFace], share: float) -> dict[str, Any]:
    """Ours whatever it takes; the others while the cell's share of the budget lasts."""
    start, deadline, session = time.perf_counter(), Deadline(share), cell.session
    try:
        cell.reference()
        for name, make in makers(cell, ours, huggingface).items():
            if session.arguments.candidates and name not in session.arguments.candidates:
                continue
            if name != "dsmoe" and deadline.left < (COMPILE_SECONDS if name.endswith("compiled") else 0):
                cell.record["candidates"][name] = {"skipped": "the budget"}
                continue
            cell.prepare(name, make, graph=name != "eager")
            if not alive(session.device):
                return cell.record
        cell.measure(session.arguments.repeats)
    except Exception as error:
        cell.record["error"] = failure(error)
    cell.record["seconds"] = round(time.perf_counter() - start, 1)
    return cell.record


def main() -> int:
    made = parser(__doc__ or "", budget=480)
    made.add_argument("--shapes", nargs="+", default=["deepseek-moe-16b", "llama2-7b"], help="presets")
    made.add_argument("--cells", nargs="+", default=list(CELLS), metavar="PHASE:SIZE", help="prefill:TOKENS, decode:B")
    made.add_argument("--tokens", nargs="+", type=int, help="in place of --cells: prefill of so many tokens")
    made.add_argument("--context", type=int, default=512, help="positions in the cache before a decode step")
    made.add_argument("--no-exact", dest="exact", action="store_false", help="compare with eager, not with float32")
    made.add_argument("--measure", default="speed", choices=["speed", "compile", "first-token"])
    made.add_argument("--started", type=float, default=0.0, help="first-token: when its process was started")
    arguments = parsed(made)
    torch.set_grad_enabled(False)
    if arguments.measure == "first-token":
        return once(arguments)
    session = Session("gpu_model", arguments, ("preset", "phase", "size"))
    if arguments.measure == "compile":
        session.record["compile"] = {name: measure_compile(name, arguments) for name in arguments.shapes}
        session.write()
        return 0
    cells = [f"prefill:{tokens}" for tokens in arguments.tokens] if arguments.tokens else arguments.cells
    plan = [(name, *cell.partition(":")[::2]) for name in arguments.shapes for cell in cells]
    plan = [(name, phase, size) for name, phase, size in plan if (name, phase, int(size)) not in session.done]
    before, left = "", len(plan)
    for name, phase, size in plan:
        if name != before:
            model = exact = ours = None
            huggingface: dict[str, HuggingFace] = {}
            release(session.device)
            model = candidates.make_model(name, session.device)
            exact = Exact(model) if arguments.exact else None
            ours = Ours(model, compiled=arguments.compile)
            before = name
        assert model is not None
        assert ours is not None
        cell = Cell(session, name, model, f"{phase}:{size}", exact)
        record = run_cell(cell, ours, huggingface, session.deadline.left / left)
        left -= 1
        session.keep(record)
        for candidate, entry in record["candidates"].items():
            timed = "median_us" in entry
            what = f"{entry['tokens_per_second']:,.0f} tokens/s, {entry['median_us'] / 1e3:.3f} ms" if timed else entry
            share = f", {entry['share_of_bound']:.1%} of the bound" if timed else ""
            tell(f"{name} {phase} {size} {candidate:33} {what}{share}")
        tell(f"{name} {phase} {size}: {record.get('seconds')} s {record.get('error', '')}")
        if not alive(session.device):
            return session.restart()
        del cell
        release(session.device)
    told(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
