"""Kernels inside CUDA graphs: captured once, replayed with other tokens and other routing, and under torch.compile."""

from __future__ import annotations

import pytest
import torch

from dsmoe_runtime.agreement import within_budget
from tests.kernels.cases import ON_GPU
from tests.runtime.op_cases import attributes, expert_case, layer_of, moe_arguments, normal, small_config

SIZES = {"num_experts": 9, "top_k": 4, "hidden": 264, "width": 176}


def captured(call):
    """A graph of `call`, and its output's memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output


@ON_GPU
@pytest.mark.parametrize("tokens", [1, 7, 300, 2500])
def test_a_replay_with_other_routing_is_eager(device, tokens):
    """To the bit: few pairs, many rows, more slots than one launch sorts; all on one expert, none on any."""
    made = [expert_case(tokens, seed=seed, dtype=torch.bfloat16, **SIZES) for seed in range(3)]
    given = {name: None if value is None else value.to(device) for name, value in made[0].items()}
    graph, output = captured(lambda: torch.ops.dsmoe.experts(**given, **attributes()))
    routings = [made[1]["experts"], made[2]["experts"], torch.full((tokens, 4), 8), torch.full((tokens, 4), -1)]
    for routing, case in zip(routings, (made[1], made[2], made[1], made[2]), strict=True):
        given["x"].copy_(case["x"])
        given["weights"].copy_(case["weights"])
        given["experts"].copy_(routing)
        output.fill_(torch.nan)
        graph.replay()
        replayed = output.clone()
        eager = torch.ops.dsmoe.experts(**given, **attributes())
        assert torch.equal(replayed, eager)
        assert replayed.any() == (routing >= 0).any()


def layer_on(device: str, **changes):
    """Arguments of the whole layer in bfloat16, on the GPU."""
    config = small_config(hidden_size=256, moe_intermediate_size=160, **changes)
    arguments = moe_arguments(layer_of(config, torch.bfloat16).requires_grad_(False))
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


@ON_GPU
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_a_replay_of_the_layer_is_eager(device, tokens):
    """Router included, so the routing is the graph's own."""
    arguments = layer_on(device)
    x = normal(tokens, 256, seed=1, dtype=torch.bfloat16).to(device)
    graph, (y, experts) = captured(lambda: torch.ops.dsmoe.moe(x, *arguments))
    seen = []
    for seed in (2, 3):
        x.copy_(normal(tokens, 256, seed=seed, dtype=torch.bfloat16))
        graph.replay()
        eager_y, eager_experts = torch.ops.dsmoe.moe(x, *arguments)
        assert torch.equal(experts, eager_experts)
        assert torch.equal(y, eager_y)
        seen.append(experts.clone())
    assert not torch.equal(*seen)


@ON_GPU
def test_reduce_overhead_is_eager(device):
    """torch.compile's CUDA graphs around the operator; what lies beside it may be fused, and so round otherwise."""
    arguments = layer_on(device)

    def block(x):
        y, _ = torch.ops.dsmoe.moe(x * 1.5, *arguments)
        return x + y

    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # warm-up, capture, replays
        x = normal(63, 256, seed=seed, dtype=torch.bfloat16).to(device)
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(x).clone(), block(x)
        y, _ = torch.ops.dsmoe.moe(x * 1.5, *arguments)
        verdict = within_budget(actual, eager=expected, exact=x.double() + y.double())
        assert verdict.ok, str(verdict)
