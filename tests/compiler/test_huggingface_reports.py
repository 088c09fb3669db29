"""What is said of every layer: gate, experts, operator, weights, kernel and FLOPs; or node, reason and advice."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoe_compiler import backend
from dsmoe_compiler.explanation import Explanation, LayerReport
from dsmoe_compiler.huggingface.explaining import NO_GRAPH, UNSEEN, explain_graphs
from dsmoe_compiler.layer_reports import _owner
from dsmoe_runtime.errors import NotFusedError
from tests.compiler.test_huggingface_practice import Blocks, experts_of, hidden

pytest.importorskip("transformers")
T, H, E, K, I = 12, 32, 8, 2, 24  # the sizes of Blocks and hidden()  # noqa: E741
ROUTER, ROUTED = 2 * T * H * E, 2 * T * K * 3 * H * I


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> object:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def explained(model: nn.Module, x: Tensor | None = None) -> Explanation:
    with torch.no_grad():
        return explain_graphs(model, (hidden() if x is None else x,))


def test_a_whole_layer() -> None:
    layer = explained(Blocks()).layers[1]
    assert layer.name == "blocks.1"
    assert (layer.gate, layer.experts) == ("top-2 of softmax, renormalised", "grouped_mm")
    assert (layer.operator, layer.weights, layer.kernel) == ("dsmoe::moe", "shared with the model", "torch rule on cpu")
    assert (layer.reason, layer.node, layer.advice) == (None, None, None)
    assert layer.flops == layer.fused_flops == ROUTER + ROUTED


def test_shares_and_reasons_of_a_model_fused_in_part() -> None:
    model = Blocks()
    first, second = experts_of(model)
    first.register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))  # experts only
    explanation = explained(model)
    assert explanation.fused_share == (2 * ROUTED + ROUTER) / (2 * ROUTED + 2 * ROUTER)
    assert explanation.summary.startswith("2 of 2 mixture-of-experts layers fused, 97.37 % of the FLOPs")
    torch._dynamo.reset()
    twice = type("Twice", (nn.Module,), {"forward": lambda _, weight: 2 * weight})
    nn.utils.parametrize.register_parametrization(second, "down_proj", twice())
    explanation = explained(model)
    left = explanation.left_alone[0]
    assert left.name == "blocks.1"
    assert left.node
    assert left.advice == "The layer runs as it was captured"
    assert (left.flops, left.fused_flops) == (ROUTER + ROUTED, 0)
    assert explanation.fused_share == ROUTED / (2 * ROUTED + 2 * ROUTER)


def test_json_holds_everything_and_the_summary() -> None:
    told = json.loads(json.dumps(explained(Blocks()).to_dict()))
    assert (told["layers_seen"], told["layers_fused"], told["fused_share"]) == (2, 2, 1.0)
    assert {"gate", "experts", "operator", "weights", "kernel", "reason", "node", "advice"} <= set(told["layers"][0])
    assert [step["name"] for step in told["passes"]][:2] == ["canonicalise", "match_experts"]


class Sideways(nn.Module):
    """Stacked experts of no spelling that anybody matches: every expert on every token, and a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, H))
        self.down = nn.Parameter(torch.randn(4, H, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ehi,...ei->...eh", self.down, torch.einsum("eih,...h->...ei", self.up, x)).amax(-2)


class Broken(Sideways):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


@pytest.mark.parametrize(("holder", "reason"), [(Sideways, UNSEEN), (Broken, NO_GRAPH)])
def test_stacked_experts_that_no_pass_saw_are_listed_too(holder: type[nn.Module], reason: str) -> None:
    explanation = explained(nn.Sequential(holder()))
    assert [(layer.name, layer.fused, layer.reason) for layer in explanation.layers] == [("0", False, reason)]
    assert bool(explanation.notes) == (holder is Broken)  # the graph break is told


def test_results_belong_to_the_nearest_layer() -> None:
    blocks = ["model.layers.1.mlp", "model.layers.11.mlp", "model.layers.2"]
    assert _owner("model.layers.1.mlp.gate", blocks) == 0
    assert _owner("model.layers.11.mlp.gate", blocks) == 1
    assert _owner("model.layers.2.router", blocks) == 2
    assert _owner("lm_head", blocks) is None
    assert _owner("", [""]) == 0
    assert _owner("model.layers.1.mlp", []) is None


def test_the_back_end_keeps_and_says_each_graph(caplog: pytest.LogCaptureFixture) -> None:
    fused = LayerReport("a", True, "gate + experts", "dsmoe::moe", "torch rule on cpu")
    left = LayerReport("b", False, "", None, "as captured", "why", "bmm_1")
    with caplog.at_level(logging.INFO, backend.__name__):
        backend.report(Explanation((fused, left), ()), strict=False)
    assert backend.last_report() == backend.reports()[-1] == Explanation((fused, left), ())
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "1 of 2 mixture-of-experts layers fused"),
        ("INFO", "a: gate + experts -> dsmoe::moe (torch rule on cpu)"),
        ("WARNING", "b: left alone at bmm_1: why"),
    ]
    with pytest.raises(NotFusedError, match="1 layers left alone; b at bmm_1: why"):
        backend.report(Explanation((fused, left), ()), strict=True)


def test_a_size_that_depends_on_data_has_no_flops() -> None:
    unknown: Any = Explanation((LayerReport("a", True, "", "dsmoe::moe", ""),), ())
    assert unknown.fused_share is None
    assert unknown.summary == "1 of 1 mixture-of-experts layers fused"
