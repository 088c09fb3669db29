"""The proof passes what is faithful, whatever the model, and says what it found so that one can act on it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.verify import Check, Verification, probes, verify
from dsmoe_compiler.verify.exact import exact_values, float64_model, possible_experts
from dsmoe_compiler.verify.layers import scaled_call
from dsmoe_compiler.verify.trace import EagerRunner, recorded, run
from dsmoe_compiler.verify.whole import check_greedy
from dsmoe_model.attention import KVCache
from dsmoe_model.transformer import Transformer
from tests.compiler.stand_in import StandInRunner, fused_layers, model_of, verified

DTYPES = [torch.float32, torch.float16]
MODELS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1 parity gate": {"router_dtype": "activation"},
    "v2": {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 4.0},
    "v3": {
        "n_routed_experts": 12,
        "n_group": 3,
        "topk_group": 2,
        "group_score": "top2",
        "scoring_func": "sigmoid",
        "selection_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "gpt-oss gate": {"scoring_func": "softmax_after_topk", "hidden_act": "swiglu_oai", "n_shared_experts": 0},
    "switch": {"num_experts_per_tok": 1, "n_shared_experts": 0},
    "every expert": {"num_experts_per_tok": 7},
    "tiny activations": {"initializer_range": 0.02},
    "dense": {"n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0},
    "shared experts only": {"n_routed_experts": 0, "n_shared_experts": 4, "num_experts_per_tok": 0},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in MODELS] + [(name, dtype) for name in ("v1", "v3") for dtype in DTYPES],
)
def test_a_faithful_artifact_passes(name: str, dtype: torch.dtype) -> None:
    model = model_of(dtype, seed=1, **MODELS[name])
    verification = verified(model)
    assert verification.ok, str(verification)
    assert verification.first_diverging_layer is None
    fused = 3 if model.config.n_routed_experts else 0
    assert len(verification.checks) == fused + 5


def test_a_batch_passes_and_a_fault_in_one_of_its_rows_is_placed() -> None:
    class SecondRow(StandInRunner):
        def decode(self, ids_B1, position, cache):
            logits_BV, experts = super().decode(ids_B1, position, cache)
            if position == 8:
                logits_BV[1] = logits_BV[0]
            return logits_BV, experts

    model = model_of(torch.float32)
    assert verified(model, StandInRunner(model, batch_size=2)).ok
    verification = verified(model, SecondRow(model, batch_size=2))
    logits = next(check for check in verification.checks if check.name == "logits")
    assert "sequence 1 of batch row 1, position 8" in logits.detail
    assert not logits.ok


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_small_cache_is_enough(capacity: int) -> None:
    model = model_of(torch.float32)
    runner = StandInRunner(model)
    runner.capacity = capacity
    assert verified(model, runner).ok


def test_probes_are_fixed_and_fit() -> None:
    one, two = (probes(97, batch=2, capacity=512, seed=3) for _ in range(2))
    assert [prompt.shape for prompt, _ in one] == [(2, 1), (2, 7), (2, 48)]
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[2][0], probes(97, batch=2, capacity=512, seed=4)[2][0])
    for capacity in range(1, 70):
        for prompt, steps in probes(97, batch=1, capacity=capacity, seed=0):
            assert prompt.shape[1] >= 1
            assert prompt.shape[1] + steps <= capacity


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_not_proven(poison: float) -> None:
    """Eager and the artifact agree perfectly on NaN, which proves nothing."""
    model = model_of(torch.float32)
    with torch.no_grad():
        model.layers[2].mlp.experts.down_proj[:, 3] = poison
    verification = verified(model)
    assert not verification.ok
    assert verification.first_diverging_layer == "layers.2.mlp", str(verification)
    json.dumps(verification.to_dict(), allow_nan=False)


def test_the_result_is_plain_json_and_reads_line_by_line() -> None:
    verification = verified(model_of(torch.bfloat16))
    written = json.loads(json.dumps(verification.to_dict(), allow_nan=False))
    assert written["ok"] is True
    assert written["dtype"] == "bfloat16"
    assert written["seconds"] > 0
    assert written["checks"][0]["numbers"]["routed_experts"]["rows"] == 1 + 7 + 48 + 63
    lines = str(verification).splitlines()
    assert len(lines) == len(verification.checks) + 1
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1].startswith("the same model (bfloat16 on cpu, ")


def test_a_failure_says_layer_row_value_and_budget() -> None:
    checks = (
        Check("layers.1.mlp", True, "fine"),
        Check("logits", False, "row 3 is off by 2.0e-02, budget 7.0e-03", {}, 3),
    )
    text = str(Verification(checks, "layers.3.mlp", "float32", "cpu", 1.0))
    assert "FAIL  logits        row 3 is off by 2.0e-02, budget 7.0e-03" in text
    verdict = "not the same model: 1 of 2 checks failed; the first layer that diverges is layers.3.mlp"
    assert text.endswith(f"{verdict} (float32 on cpu, 1.0 s)")


def test_progress_is_told() -> None:
    model, told = model_of(torch.float32), []
    verify(model, StandInRunner(model), fused_layers(model), config=CompileConfig(target="cpu"), progress=told.append)
    assert told == ["eager", "3 fused layers", "artifact", "float64"]


@pytest.mark.parametrize("changes", [{}, MODELS["v3"], MODELS["dense"], {"tie_word_embeddings": True}])
def test_float64_in_parts_is_float64_at_once(changes: dict[str, Any]) -> None:
    model = model_of(torch.bfloat16, **changes)
    ids = torch.arange(14).reshape(2, 7)
    whole = Transformer(model.config).double()
    whole.load_state_dict(model.state_dict())
    cache, cache_whole = (KVCache.zeros(model.config, 2, 9, torch.float64) for _ in range(2))
    with torch.no_grad():
        output, expected = float64_model(model)(ids, cache), whole(ids, cache_whole)
    assert torch.equal(output.logits_BSV, expected.logits_BSV)
    assert all(torch.equal(a, b) for a, b in zip(cache.key, cache_whole.key, strict=True))
    assert model.embed_tokens.weight.dtype == torch.bfloat16


def test_one_part_at_a_time_is_in_float64() -> None:
    model = model_of(torch.float32)
    exact, held = float64_model(model), []

    def count(*_: Any) -> None:
        held.append(sum(p.numel() for p in exact.parameters() if p.device.type != "meta"))

    for module in exact.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        exact(torch.zeros(1, 3, dtype=torch.int64))
    largest = max(sum(p.numel() for p in part.parameters()) for block in model.layers for part in block.children())
    assert max(held) <= largest
    assert all(p.device.type == "meta" for p in exact.parameters())


def test_traces_of_unlike_lengths_do_not_touch_each_other() -> None:
    model = model_of(torch.float32)
    runner = EagerRunner(model, batch_size=1, capacity=40)
    traces = [
        run(runner, torch.full((1, length), length), runner.new_cache(), steps=steps)
        for length, steps in ((1, 2), (9, 5))
    ]
    together, alone = exact_values(model, traces), [exact_values(model, [trace])[0] for trace in traces]
    for one, other, trace in zip(together, alone, traces, strict=True):
        torch.testing.assert_close(one.logits_BNV, other.logits_BNV, rtol=1e-12, atol=1e-12)
        assert one.logits_BNV.shape == trace.logits_BNV.shape
        assert one.key[2].shape == trace.key[2].shape


def test_impossible_experts_are_replaced_not_followed() -> None:
    experts = torch.tensor([[0, 5], [5, 0], [3, 3], [-1, 2], [2, 6]])
    assert possible_experts(experts, 6).tolist() == [[0, 5], [5, 0], [0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("spread", [0.006, 0.06, 0.5])
def test_scaled_inputs_give_outputs_about_one(spread: float) -> None:
    module = model_of(torch.float32, initializer_range=spread).layers[1].mlp
    call = scaled_call(module, torch.zeros(1, 64), seed=0)
    assert 0.1 < call.y_TH.square().mean().sqrt() < 10


def test_recording_ends_with_its_block() -> None:
    model = model_of(torch.float32)
    layer = model.layers[1].mlp
    with recorded([layer]) as calls:
        model(torch.zeros(1, 3, dtype=torch.int64))
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert [len(kept) for kept in calls] == [1]
    assert calls[0][0].x_TH.shape == (3, 64)


def test_another_greedy_token_passes_only_as_a_tie() -> None:
    model = model_of(torch.float32)
    runner = EagerRunner(model, batch_size=1, capacity=20)
    eager = run(runner, torch.ones(1, 5, dtype=torch.int64), runner.new_cache(), steps=3)
    exact = exact_values(model, [eager])
    ours = run(runner, torch.ones(1, 5, dtype=torch.int64), runner.new_cache(), steps=3)
    second = int(exact[0].logits_BNV[0, 2].topk(2).indices[1])
    best = float(ours.logits_BNV[0, 2].max())
    ours.logits_BNV[0, 2, second] = best * 1.0001
    check = check_greedy([ours], [eager], exact, exact)
    assert not check.ok
    assert f"sequence 0, position 6 it says {second}" in check.detail
    exact[0].logits_BNV[0, 2, second] = exact[0].logits_BNV[0, 2].max()
    eager.logits_BNV[0, 2, second] = best * (1 - 1e-7)
    check = check_greedy([ours], [eager], exact, exact)
    assert check.ok, check.detail
    assert "3 of 4 tokens are eager's, 1 is a tie within rounding" in check.detail
