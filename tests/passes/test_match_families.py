"""Models that transformers builds: every layer of routed experts becomes one operator, whatever spells it."""

from itertools import product

import pytest
import torch

from dsmoe_passes.canonicalise import canonicalise
from dsmoe_passes.match_experts import match_experts
from dsmoe_runtime.agreement import assert_within_budget

pytest.importorskip("transformers")

from tests.passes.hf_models import FAMILIES, captured, layers, prompt, tiny

SPELLINGS = ("grouped_mm", "batched_mm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = list(product(FAMILIES, SPELLINGS, DTYPES))
QUICK = {(family, SPELLINGS[i % 2], DTYPES[i % 3]) for i, family in enumerate(FAMILIES)}
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERYTHING]


def fuse(graph: torch.fx.GraphModule, spelling: str, expected: int) -> None:
    canonicalise(graph)
    result = match_experts(graph)
    graph.graph.lint()
    graph.recompile()
    assert not result.refused
    assert [r.pattern for r in result.rewritten] == [spelling] * expected
    left = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not left & {"aten.sort.default", "aten.bmm.default", "aten.histc.default", "aten.index_put.default"}


@pytest.mark.parametrize(("family", "spelling", "dtype"), CASES)
def test_every_layer_becomes_one_operator(family: str, spelling: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype, experts_implementation=spelling)
    ((graph, inputs),) = captured(model, prompt(), use_cache=False)
    with torch.no_grad():
        eager = graph(*inputs)[0]
        fuse(graph, spelling, layers(model))
        actual = graph(*inputs)[0]
        if dtype is torch.float32:  # in a narrower dtype two roundings may choose different experts in the next layer
            exact = tiny(family, dtype=torch.float64, experts_implementation="eager")(prompt(), use_cache=False).logits
            assert_within_budget(actual, eager=eager, exact=exact)


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("gpt_oss", "grouped_mm"), pytest.param("deepseek_v3", "batched_mm", marks=pytest.mark.slow)],
)
def test_one_token_and_any_number_of_tokens(family: str, spelling: str) -> None:
    model = tiny(family, experts_implementation=spelling)
    ((graph, _),) = captured(model, prompt(1, 1), use_cache=False)
    fuse(graph, spelling, layers(model))
    ids = prompt()
    torch._dynamo.mark_dynamic(ids, 0)
    torch._dynamo.mark_dynamic(ids, 1)
    ((graph, _),) = captured(model, ids, use_cache=False)
    fuse(graph, spelling, layers(model))


@pytest.mark.parametrize(("family", "spelling"), [("gpt_oss", "batched_mm"), ("qwen2_moe", "grouped_mm")])
def test_gradients_are_those_of_the_graph_as_it_was(family: str, spelling: str) -> None:
    model = tiny(family, experts_implementation=spelling).train()
    ((graph, inputs),) = captured(model, prompt(), grad=True, use_cache=False)
    learned = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    before = torch.autograd.grad(graph(*inputs)[0].square().mean(), learned, allow_unused=True)
    fuse(graph, spelling, layers(model))
    after = torch.autograd.grad(graph(*inputs)[0].square().mean(), learned, allow_unused=True)
    assert sum(gradient is not None for gradient in before) > 20
    for was, now in zip(before, after, strict=True):
        assert (was is None) == (now is None)
        if was is not None and now is not None:
            assert (now - was).norm() <= 1e-5 * was.norm()
