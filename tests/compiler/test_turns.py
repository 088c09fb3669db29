"""A loop traced for three experts and written out is the loop traced in full; one with an odd turn never is."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsmoe_compiler import blocks
from dsmoe_compiler.blocks import Block, raise_block
from dsmoe_compiler.turns import TRACED, regular_loop, write_out
from dsmoe_model.experts import RoutedExperts
from dsmoe_model.mlp import activation
from dsmoe_model.transformer import build
from tests.compiler.test_backend import SMALL

EXPERTS = 8


def block(**changes: Any) -> Block:
    config = replace(SMALL, n_routed_experts=EXPERTS, **changes)
    module = build(config, seed=3).layers[1].mlp
    return Block("mlp", module, (torch.zeros(1, 4, config.hidden_size), torch.zeros(1, 4, dtype=torch.int64), None))


def described(graph: fx.Graph) -> list[tuple[str, ...]]:
    """A graph without the names of its nodes and symbols."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    rows = []
    for node in graph.nodes:
        args = str(fx.node.map_arg((node.args, node.kwargs), lambda other: number[other]))
        kept = [re.sub(r"\bu\d+\b", "u", str(node.meta.get(key))) for key in ("val", "nn_module_stack", "stack_trace")]
        rows.append((node.op, str(node.target), re.sub(r"\bu\d+\b|'ge(_\d+)?'", "u", args), *kept))
    return rows


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"scoring_func": "sigmoid"}])
def test_the_graph_is_that_of_a_full_trace(changes: dict[str, Any]) -> None:
    one = block(**changes)
    count = regular_loop(one.module, one.args)
    assert count is not None
    assert (count.name, count.value) == ("n_routed_experts", EXPERTS)
    with count.set_to(TRACED):
        few = blocks._export_whole(one).graph
    assert write_out(few, EXPERTS)
    few.lint()
    assert one.module.experts.n_routed_experts == EXPERTS  # type: ignore[union-attr]
    assert described(few) == described(blocks._export_whole(one).graph)


def test_it_is_raised_and_computes_what_eager_does() -> None:
    one = block()
    raised = raise_block(one, debug=True)
    assert raised.reason is None
    assert next(r.pattern for step in raised.steps for r in step.result.rewritten) == f"loop over {EXPERTS} experts"


def odd(turn: Callable[[int, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The experts' own loop, with a turn's output as `turn` changes it."""

    def forward(self: RoutedExperts, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for expert in range(self.n_routed_experts):
            token, slot = torch.where(experts_TK == expert)
            gate, up = F.linear(x_TH[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = F.linear(activation(gate, up, self.config), self.down_proj[expert])
            y_TH = turn(expert, y_TH, y_TH.index_add(0, token, out.float() * weights_TK[token, slot, None]))
        return y_TH

    return forward


FAULTS: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "an expert is skipped": lambda expert, before, after: before if expert == 5 else after,
    "the sum doubles on the way": lambda expert, _, after: after * 2 if expert == 5 else after,
    "a constant that is no expert's number": lambda expert, _, after: after + (9 if expert > 4 else expert),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loop_with_an_odd_turn_is_traced_in_full(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutedExperts, "forward", odd(FAULTS[fault]))
    one = block()
    assert regular_loop(one.module, one.args) is None
    assert raise_block(one).graph is None


def test_the_plain_spelling_of_the_same_loop_is_regular(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutedExperts, "forward", odd(lambda _, __, after: after))
    one = block()
    assert regular_loop(one.module, one.args) is not None


def test_what_depends_on_the_count_elsewhere_is_traced_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum divided by the number of experts: three would be baked in."""
    plain = odd(lambda _, __, after: after)

    def forward(self: RoutedExperts, *args: Tensor) -> Tensor:
        return plain(self, *args) / self.n_routed_experts

    monkeypatch.setattr(RoutedExperts, "forward", forward)
    one = block()
    assert regular_loop(one.module, one.args) is None


def test_modules_without_a_loop_have_no_count() -> None:
    assert regular_loop(nn.Linear(3, 3), (torch.zeros(2, 3),)) is None
