"""The proof: an artifact is the model that it was compiled from, layer by layer and end to end, on its own target.

Eager in the artifact's dtype sets the budgets, float64 is the truth, and nothing is judged by an absolute tolerance
(`dsmoe_runtime.agreement`). It costs a few short greedy runs and one float64 pass of the model and of each fused layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.verify.exact import exact_values
from dsmoe_compiler.verify.layers import FusedLayer, check_layer
from dsmoe_compiler.verify.result import Check, Verification
from dsmoe_compiler.verify.trace import Call, EagerRunner, RunnerLike, Trace, recorded, run
from dsmoe_compiler.verify.whole import check_cache, check_greedy, check_logits, check_repeat, check_routing
from dsmoe_model.attention import KVCache
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer
from dsmoe_runtime.agreement import OWN_KERNELS, Allowance

__all__ = ["Check", "FusedLayer", "Verification", "probes", "verify"]

PROMPTS = (1, 7, 48)
STEPS = (2, 2, 12)


def verify(
    model: Transformer,
    runner: RunnerLike,
    layers: Sequence[FusedLayer],
    *,
    config: CompileConfig,
    progress: Callable[[str], None] | None = None,
    allowance: Allowance = OWN_KERNELS,
) -> Verification:
    """Compare `runner`, the artifact on its target, with `model`, eager in the same dtype on the same device.

    `layers` are the fused layers with their operators. `allowance` says how far the runner may be off. Raises
    nothing for a difference: the caller decides by `Verification.ok`.
    """
    say = progress or (lambda message: None)
    start = time.perf_counter()
    routing_layers = [module for module in model.modules() if isinstance(module, MoE) and module.router is not None]
    plan = probes(model.config.vocab_size, batch=runner.batch_size, capacity=runner.capacity, seed=config.seed)
    device = model.embed_tokens.weight.device

    say("eager")
    eager: list[Trace] = []
    calls: list[list[list[Call]]] = []  # per probe, per routing layer, per step
    for prompt_BS, steps in plan:
        reference = EagerRunner(model, batch_size=runner.batch_size, capacity=prompt_BS.shape[1] + steps)
        with recorded(routing_layers) as kept:
            eager.append(run(reference, prompt_BS.to(device), reference.new_cache(), steps=steps))
        calls.append(kept)

    say(f"{len(layers)} fused layers")
    place = {block.mlp: index for index, block in enumerate(model.layers)}
    checks = []
    for layer in layers:
        order = routing_layers.index(layer.module)
        prefills = [kept[order][0] for kept in calls]
        checks.append(check_layer(layer, prefills, index=place[layer.module], seed=config.seed))

    say("artifact")
    ours = [_follow(runner, trace, runner.new_cache()) for trace in eager]
    used = runner.new_cache()
    again = [_follow(runner, trace, used) for trace in reversed(eager)][::-1]

    say("float64")
    exact = exact_values(model, [*ours, *eager])
    exact, exact_eager = exact[: len(ours)], exact[len(ours) :]
    scores = [[_joined(layer_calls, runner.batch_size) for layer_calls in kept] for kept in calls]
    routing = check_routing(model, ours, eager, scores, exact, exact_eager)
    checks += [
        check_cache(ours, eager, exact, exact_eager, allowance),
        check_logits(ours, eager, exact, exact_eager, allowance),
        routing,
        check_greedy(ours, eager, exact if routing.ok else exact_eager, exact_eager),
        check_repeat(ours, again),
    ]
    return Verification(
        checks=tuple(checks),
        first_diverging_layer=_first_diverging(checks, {place[layer.module]: layer.name for layer in layers}),
        dtype=str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        device=str(device),
        seconds=time.perf_counter() - start,
    )


def probes(vocab_size: int, *, batch: int, capacity: int, seed: int) -> list[tuple[Tensor, int]]:
    """Fixed prompts `[B, S]` of random tokens, each with the number of tokens to decode after it.

    1, 7 and 48 tokens with 2, 2 and 12 steps; shorter where the cache holds less.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = []
    for length, steps in zip(PROMPTS, STEPS, strict=True):
        steps = min(steps, capacity // 2)
        length = min(length, capacity - steps)
        plan.append((torch.randint(vocab_size, (batch, length), generator=generator), steps))
    return plan


def _follow(runner: RunnerLike, eager: Trace, cache: KVCache) -> Trace:
    prompt_BS, tokens_BN = eager.ids_BS[:, : eager.prompt], eager.ids_BS[:, eager.prompt :]
    return run(runner, prompt_BS, cache, steps=eager.steps, tokens_BN=tokens_BN)


def _joined(calls: Sequence[Call], batch: int) -> Tensor:
    """Scores `[B, S, E]` of one layer over prefill and decode."""
    return torch.cat([call.routing.scores_TE.unflatten(0, (batch, -1)) for call in calls], dim=1)


def _first_diverging(checks: Sequence[Check], names: dict[int, str]) -> str | None:
    accused = [check.layer for check in checks if check.layer is not None]
    if not accused:
        return None
    return names.get(min(accused), f"layers.{min(accused)}")
