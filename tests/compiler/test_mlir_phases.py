"""Prefill and decode as programs of the CPU target: equal to eager over a generation, caches written where they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("torch_mlir")

from dsmoe_compiler.capture import Capture
from dsmoe_compiler.targets.mlir.program import Program, compile_program
from dsmoe_model.attention import KVCache
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import OTHER_KERNELS, within_budget
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from tests.compiler.test_mlir_backend import SMALL

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
CAPACITY, STEPS = 48, 20
MODELS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "V3's gate": (
        torch.float32,
        {
            "scoring_func": "sigmoid", "selection_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "group_score": "top2",
        },
    ),
    "every head its own keys": (torch.float32, {"num_key_value_heads": 2}),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformer, dict[str, Program]]:
    dtype, changes = MODELS[request.param]
    model = build(replace(SMALL, **changes), dtype=dtype, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "objects"))
        phases = Capture(model, batch=1, capacity=CAPACITY).phases()
        return model, {phase.name: compile_program(phase.graph, phase.name) for phase in phases}


def start(model: Transformer, fill: float) -> KVCache:
    dtype = model.embed_tokens.weight.dtype
    cache = KVCache.zeros(model.config, 1, CAPACITY, dtype)
    for tensor in (*cache.key, *cache.value):
        tensor.fill_(fill)
    return cache


def judge(model: Transformer, ids: Tensor, ours: Tensor, eager: Tensor, experts: list[Tensor]) -> None:
    exact = build(model.config, dtype=model.embed_tokens.weight.dtype, seed=3).double()
    truth = exact(ids, experts=experts).logits_BSV[0, -len(ours) :].detach()
    verdict = within_budget(ours, eager=eager, exact=truth, **OTHER_KERNELS._asdict())
    assert verdict.ok, verdict


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 7, 20])
def test_a_generation_is_that_of_eager(compiled: tuple[Transformer, dict[str, Program]], prompt: int) -> None:
    """At the experts that we chose: eager is told them, and its own choice agrees but for ties of rounded scores."""
    model, programs = compiled
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    cache, lies = start(model, float("nan")), 0
    places = [tensor.data_ptr() for tensor in (*cache.key, *cache.value)]
    logits, chosen = programs["prefill"]([ids, *cache.key, *cache.value])
    rows, experts = [logits], [chosen]
    for step in range(STEPS):
        position = torch.tensor([prompt + step])
        ids = torch.cat([ids, rows[-1].argmax(-1, keepdim=True)], dim=1)
        logits, chosen = programs["decode"]([ids[:, -1:], position, *cache.key, *cache.value])
        rows.append(logits)
        experts.append(chosen)
    forced = list(torch.cat(experts, dim=1))
    free, told = model(ids), model(ids, experts=forced)
    lies = sum(
        int((a.sort(-1).values != b.experts_TK.sort(-1).values).any(-1).sum())
        for a, b in zip(forced, free.routing, strict=True)
    )
    limit = 0 if model.embed_tokens.weight.dtype == torch.float32 else 0.1 * forced[0].shape[0] * len(forced)
    assert lies <= limit
    judge(model, ids, torch.cat(rows), told.logits_BSV[0, prompt - 1 :], forced)
    assert places == [tensor.data_ptr() for tensor in (*cache.key, *cache.value)]
    filled = prompt + STEPS
    for tensor in (*cache.key, *cache.value):
        assert not tensor[:, :, :filled].isnan().any()
        assert tensor[:, :, filled:].isnan().all()  # nobody wrote there, and nobody read it


@torch.no_grad()
def test_the_same_input_gives_the_same_bits(compiled: tuple[Transformer, dict[str, Program]]) -> None:
    model, programs = compiled
    ids = torch.arange(11)[None] % model.config.vocab_size
    results = []
    for _ in range(2):
        cache = start(model, 0.0)
        results.append([*programs["prefill"]([ids, *cache.key, *cache.value]), *cache.key, *cache.value])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_are_those_of_the_model(compiled: tuple[Transformer, dict[str, Program]]) -> None:
    """Both phases read the very memory: nothing was copied, but for what the passes pack."""
    model, programs = compiled
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for program in programs.values():
        foreign = [n for n, tensor in program.weights.items() if tensor.data_ptr() not in own]
        assert all("packed" in name or "bias" in name for name in foreign), foreign
