"""One whole layer of deepseek-moe-16b on one H200, bf16: gate, routed and shared experts, cold, in CUDA graphs.

    python -m benchmarks.gpu_layer
    python -m benchmarks.gpu_layer --tokens 1 64 --candidates dsmoe "dsmoe routed"

What should be paid for a layer is what its routed experts cost plus the roofline of the shared ones; "dsmoe routed" is
timed in the same turns for that. Beside it stand the oracle's block (eager, outside a graph: its loop waits for the
host), torch grouped_mm and transformers' DeepSeek-V2 block, compiled. Results: benchmarks/results/gpu_layer_h200.json.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import gpu_candidates as candidates
from benchmarks.gpu_timing import (
    COLD_BYTES,
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
    roofline_seconds,
    summary,
    tell,
    told,
)
from dsmoe_compiler.witness import block_to_transformers
from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE
from dsmoe_model.presets import preset
from dsmoe_runtime.agreement import routing_agreement, within_budget

DTYPE = torch.bfloat16
ROWS = 32
Layer = Callable[[Tensor, int], Any]  # x [T, H] and the number of the weights' copy -> y [T, H], or (y, experts)


def layer_config(name: str) -> ModelConfig:
    """The preset's layer; "tiny" is one to try the script with."""
    if name == "tiny":
        small: dict[str, Any] = {
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        }
        return replace(preset("deepseek-moe-16b"), **small)
    return preset(name)


def build_layer(config: ModelConfig, device: torch.device) -> MoE:
    """The oracle's block with random weights on the device, at the scale at which its output is about 1."""
    with torch.device("meta"):
        layer = MoE(config)
    layer = layer.to(DTYPE).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in layer.parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return layer


class Weights:
    """Copies of one layer, each in the spelling of every candidate."""

    def __init__(self, layer: MoE, copies: int) -> None:
        self.layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        self.joined = []
        for each in self.layers:
            assert each.shared_experts is not None
            self.joined.append(torch.cat((each.shared_experts.gate_proj.weight, each.shared_experts.up_proj.weight)))

    def operator(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """dsmoe::moe, as the compiler calls it: y and the experts."""
        layer: Any = self.layers[index]
        c = layer.router.config
        return torch.ops.dsmoe.moe(
            *(x, layer.router.weight, None, None, c.num_experts_per_tok, c.scoring_func, c.n_group, c.topk_group),
            *(c.group_score, c.norm_topk_prob, c.norm_eps, c.routed_scaling_factor, c.router_dtype),
            *(layer.experts.gate_up_proj, layer.experts.down_proj, None, None, "silu", 1.0, 1.0, "concat"),
            *(self.joined[index], layer.shared_experts.down_proj.weight, None),
        )

    def tensors(self, index: int) -> tuple[Tensor, ...]:
        """router, gate_up, down, shared gate, shared up, shared down."""
        layer: Any = self.layers[index]
        shared = layer.shared_experts
        routed = (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj)
        return (*routed, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)


def stock_layer(x: Tensor, top_k: int, router: Tensor, gate_up: Tensor, down: Tensor, *shared: Tensor) -> Tensor:
    """The layer with torch's own operators: softmax, topk, grouped_mm, and the shared experts as two products."""
    weights, ids = F.linear(x.float(), router.float()).softmax(-1).topk(top_k, dim=-1)
    gate, up, last = shared
    return candidates.grouped_mm(x, ids, weights, gate_up, down) + F.linear(
        F.silu(F.linear(x, gate)) * F.linear(x, up), last
    )


def layers(weights: Weights, config: ModelConfig, *, compiled: bool) -> dict[str, Callable[[], Layer]]:
    """How each candidate that goes into a graph is made."""

    def stock() -> Layer:
        function = torch.compile(stock_layer, dynamic=False) if compiled else stock_layer
        return lambda x, index: function(x, config.num_experts_per_tok, *weights.tensors(index))

    def huggingface(implementation: str) -> Layer:
        blocks = [block_to_transformers(w, config, experts_implementation=implementation) for w in weights.layers]
        module, states = blocks[0], [block.state_dict() for block in blocks]

        def plain(x: Tensor, state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, state, (x[None],))[0]

        function = torch.compile(plain, dynamic=False) if compiled else plain
        return lambda x, index: function(x, states[index])

    return {
        "dsmoe": lambda: weights.operator,
        "grouped_mm": stock,
        "transformers grouped_mm": lambda: huggingface("grouped_mm"),
        "transformers batched_mm": lambda: huggingface("batched_mm"),
    }


class Reference:
    """Sampled rows of the layer in float64, and eagerly in bf16 with the oracle's own operations."""

    def __init__(self, x: Tensor, weights: Weights, config: ModelConfig) -> None:
        self.x, self.config = x, config
        self.router, self.gate_up, self.down, *self.shared = weights.tensors(0)
        self.exact_scores = F.linear(x.double(), self.router.double()).softmax(-1)
        self.eager_scores = F.linear(x.float(), self.router.float()).softmax(-1)
        self.eager_ids = self.eager_scores.topk(config.num_experts_per_tok, dim=-1).indices
        self.eager = self.answer(self.eager_ids, self.eager_scores, DTYPE)
        self.exact_eager = self.answer(self.eager_ids, self.exact_scores, torch.float64)

    def answer(self, ids: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        routed = candidates.loop(self.x, ids, scores.gather(1, ids), self.gate_up, self.down, dtype)
        gate, up, last = (weight.to(dtype) for weight in self.shared)
        x = self.x.to(dtype)
        return routed + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), last)

    def verdict(self, y: Tensor, ids: Tensor | None) -> dict[str, Any]:
        """Values within the budget for the experts that were chosen, and the choice within what rounding excuses."""
        exact = self.exact_eager if ids is None else self.answer(ids, self.exact_scores, torch.float64)
        found = within_budget(y, eager=self.eager, exact=exact, exact_eager=self.exact_eager)
        facts = {"ok": found.ok, "worst": found.worst, "budget": found.budget, "rows": found.rows}
        if ids is not None:
            routing = routing_agreement(ids, self.eager_ids, exact_TE=self.exact_scores, eager_TE=self.eager_scores)
            facts |= {"ok": found.ok and routing.ok, "other_experts_than_eager": routing.mismatches}
        return facts


def rooflines(config: ModelConfig, distinct: float, tokens: int) -> dict[str, float]:
    """Microseconds of the routed experts, the shared ones, and the whole layer."""
    of_expert = 3 * config.hidden_size * config.moe_intermediate_size
    shared, gate = of_expert * config.n_shared_experts, config.hidden_size * config.n_routed_experts
    io = 4 * tokens * config.hidden_size
    routed_flop = 2.0 * of_expert * config.num_experts_per_tok * tokens
    bytes_flop = {
        "routed": (2 * distinct * of_expert + io, routed_flop),
        "shared": (2 * shared, 2.0 * shared * tokens),
        "layer": (2 * (distinct * of_expert + shared + gate) + io, routed_flop + 2.0 * (shared + gate) * tokens),
    }
    return {name: 1e6 * roofline_seconds(*each) for name, each in bytes_flop.items()}


def run_cell(session: Session, config: ModelConfig, tokens: int, share: float) -> dict[str, Any]:
    """All candidates for one number of tokens."""
    start, deadline, device, arguments = time.perf_counter(), Deadline(share), session.device, session.arguments
    layer: Any = build_layer(config, device)
    generator = torch.Generator(device).manual_seed(tokens)
    count = 2 if device.type == "cpu" else 16 if tokens <= 64 else 4
    xs = [torch.randn(tokens, config.hidden_size, generator=generator, device=device).to(DTYPE) for _ in range(count)]
    scores = [F.linear(x.float(), layer.router.weight.float()).softmax(-1) for x in xs]
    routed = [found.topk(config.num_experts_per_tok, dim=-1) for found in scores]
    distinct = sum(found.indices.unique().numel() for found in routed) / count
    of_expert = 6 * config.hidden_size * config.moe_intermediate_size
    copies = math.ceil(COLD_BYTES / ((distinct + config.n_shared_experts) * of_expert)) if device.type == "cuda" else 2
    weights = Weights(layer, max(1, copies))
    roofs = rooflines(config, distinct, tokens)
    record: dict[str, Any] = {"tokens": tokens, "distinct_experts": distinct, "calls": count, "candidates": {}}
    record |= {"weight_copies": len(weights.layers), "roofline_us": roofs}
    rows = torch.linspace(0, tokens - 1, min(tokens, ROWS), device=device).long()
    reference = Reference(xs[0][rows], weights, config)
    replays: dict[str, Replay] = {}

    def prepare(name: str, make: Callable[[], Layer], graph: bool = True) -> None:
        begin, entry = time.perf_counter(), dict[str, Any]()
        record["candidates"][name] = entry
        try:
            function = make()
            function(xs[0], 0)
            poison(device, *(2 * tokens * config.hidden_size * k for k in (1, config.num_experts_per_tok)))
            answer = function(xs[0], 0)
            entry["first_call_seconds"] = round(time.perf_counter() - begin, 2)
            if name != "dsmoe routed":
                y, ids = answer if isinstance(answer, tuple) else (answer, None)
                entry["agreement"] = reference.verdict(y[rows], None if ids is None else ids[rows])
                entry["agreement"]["ok"] &= bool(y.isfinite().all())
                if not entry["agreement"]["ok"] and not arguments.disagreeing:
                    return
            calls = [lambda i=i: function(xs[i], i % len(weights.layers)) for i in range(count if graph else 1)]
            replays[name] = Replay(calls, device, graph=graph)
        except Exception as error:  # one candidate's failure must not cost the others their measurement
            entry["error"] = failure(error)

    def routed_alone(x: Tensor, index: int) -> Tensor:
        choice = routed[next(i for i, each in enumerate(xs) if each is x)]
        stacks: Any = weights.layers[index].experts
        return candidates.dsmoe(x, choice.indices, choice.values, stacks.gate_up_proj, stacks.down_proj)

    makers = layers(weights, config, compiled=arguments.compile)
    ours = makers.pop("dsmoe")
    if tokens > 64:
        makers.pop("transformers batched_mm")
    plan: list[tuple[str, Callable[[], Layer], bool]] = [
        ("dsmoe", ours, True),
        ("dsmoe routed", lambda: routed_alone, True),
        ("eager", lambda: lambda x, index: weights.layers[index](x[None])[0][0], False),
        *((name, make, True) for name, make in makers.items()),
    ]
    slowest = 0.0
    for name, make, graph in plan:
        if arguments.candidates and name not in arguments.candidates:
            continue
        if not name.startswith("dsmoe") and deadline.left < slowest:
            record["candidates"][name] = {"skipped": "the budget"}
            continue
        before = time.perf_counter()
        prepare(name, make, graph)
        slowest = max(slowest, time.perf_counter() - before) if not name.startswith("dsmoe") else 0.0
        if not alive(device):
            return record
    try:
        for name, seconds in interleave(replays, arguments.repeats).items():
            entry = record["candidates"][name]
            entry |= summary(seconds)
            entry["share_of_roofline"] = roofs["routed" if name == "dsmoe routed" else "layer"] / entry["median_us"]
    except Exception as error:
        record["error"] = failure(error)
    medians = {name: entry.get("median_us") for name, entry in record["candidates"].items()}
    if medians.get("dsmoe") and medians.get("dsmoe routed"):
        record["paid_us"] = medians["dsmoe routed"] + roofs["shared"]
        record["over_paid"] = medians["dsmoe"] / record["paid_us"]
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def main() -> int:
    made = parser(__doc__ or "", budget=120)
    made.add_argument("--shapes", nargs=1, default=["deepseek-moe-16b"], help="a preset, or tiny to try the script")
    made.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 4096])
    arguments = parsed(made)
    torch.set_grad_enabled(False)
    config = layer_config(arguments.shapes[0])
    session = Session("gpu_layer", arguments, ("tokens",))
    session.record |= {
        "preset": arguments.shapes[0],
        "limit_over_paid": 1.10,
        "hidden": config.hidden_size,
        "width": config.moe_intermediate_size,
        "experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "shared": config.n_shared_experts,
    }
    plan = [tokens for tokens in arguments.tokens if (tokens,) not in session.done]
    for index, tokens in enumerate(plan):
        cell = run_cell(session, config, tokens, session.deadline.left / (len(plan) - index))
        session.keep(cell)
        for name, entry in cell["candidates"].items():
            what = f"{entry['median_us']:.1f} us" if "median_us" in entry else str(entry)
            tell(f"T={tokens:<5} {name:24} {what}")
        over = f"{cell['over_paid']:.3f}" if "over_paid" in cell else "unknown"
        tell(f"T={tokens:<5} over routed + shared roofline: {over}, limit 1.10; {cell.get('seconds')} s")
        if not alive(session.device):
            return session.restart()
        release(session.device)
    told(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
