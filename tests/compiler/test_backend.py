"""`torch.compile(model, backend="dsmoe")`: one graph, every layer fused, the numbers of eager, in training too."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from dsmoe_compiler.backend import functional, read_options
from dsmoe_model.attention import KVCache
from dsmoe_model.presets import preset
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import ConfigError
from tests.passes.loops import Loop, inputs

SMALL = replace(
    preset("deepseek-moe-tiny"),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    moe_intermediate_size=24,
    n_routed_experts=5,
    num_experts_per_tok=2,
    initializer_range=0.2,
)


class Seen:
    """The back end, with a look at what it hands to Inductor."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        from dsmoe_passes import pipeline

        graph = functional(gm, example_inputs)
        pipeline.run(graph)
        self.graphs.append(graph)
        return graph.forward

    def count(self, name: str) -> list[int]:
        return [sum(str(n.target) == name for n in graph.graph.nodes) for graph in self.graphs]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> object:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(**changes: object) -> Transformer:
    return build(replace(SMALL, **changes), seed=1)  # type: ignore[arg-type]


def test_it_is_listed_by_name_after_an_install() -> None:
    assert "dsmoe" in torch._dynamo.list_backends()


def test_one_graph_at_every_length_without_a_break() -> None:
    """Lengths 0 and 1 are graphs of their own, all others share one; no loop is left in any."""
    eager, seen = model(), Seen()
    fast = torch.compile(eager, backend=seen)
    torch._dynamo.utils.counters.clear()
    for length in (5, 9, 1, 0, 33):
        ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            ours, theirs = fast(ids), eager(ids)
            exact = model().double()(ids, experts=[r.experts_TK for r in ours.routing])
        assert ours.logits_BSV.shape == theirs.logits_BSV.shape
        if length:
            rows = [o.logits_BSV.flatten(0, 1) for o in (ours, theirs, exact)]
            assert_within_budget(rows[0], eager=rows[1], exact=rows[2])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(seen.graphs) == 4  # 5 as it came, then any length; 1; 0
    assert seen.count("aten.index_add.default") == [0, 0, 0, 0]
    operators = (seen.count("dsmoe.moe.default"), seen.count("dsmoe.experts.default"))
    assert [sum(pair) for pair in zip(*operators, strict=True)] == [1, 1, 1, 1]


def test_a_cache_is_written_in_place() -> None:
    eager, ids, at = model(), torch.tensor([[7]]), torch.tensor([3])
    caches = [KVCache.zeros(SMALL, 1, 8, torch.float32) for _ in range(2)]
    fast = torch.compile(eager, backend=Seen())
    with torch.no_grad():
        ours, theirs = fast(ids, caches[0], at), eager(ids, caches[1], at)
    assert (ours.logits_BSV - theirs.logits_BSV).norm() <= 1e-5 * theirs.logits_BSV.norm()
    for mine, its in zip(caches[0].key + caches[0].value, caches[1].key + caches[1].value, strict=True):
        assert its.norm() > 0
        assert (mine - its).norm() <= 1e-5 * its.norm()


@pytest.mark.slow
def test_training_through_inductor_gives_eagers_loss_and_gradients() -> None:
    eager = model(n_shared_experts=1).train()
    fast = torch.compile(eager, backend="dsmoe", options={"dsmoe.strict": True})
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))

    def step(run: nn.Module) -> dict[str, Tensor]:
        eager.zero_grad()
        nn.functional.cross_entropy(run(ids).logits_BSV.flatten(0, 1), ids.flatten()).backward()
        return {name: p.grad.clone() for name, p in eager.named_parameters() if p.grad is not None}

    theirs, ours = step(eager), step(fast)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.slow
def test_options_of_inductor_pass_through_and_modes_work() -> None:
    eager, x = Loop(), inputs()
    fast = torch.compile(eager, backend="dsmoe", mode="reduce-overhead")
    with torch.no_grad():
        assert (fast(x)[0] - eager(x)[0]).norm() <= 1e-5 * eager(x)[0].norm()


def test_strict_names_the_layer_left_alone() -> None:
    fast = torch.compile(Loop("gate and up swapped"), backend="dsmoe", options={"dsmoe.strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="up lies before gate"):
        fast(inputs())


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"dsmoe\.strikt; there are dsmoe\.strict, dsmoe\.dump"):
        read_options({"dsmoe.strikt": True})
    assert read_options({"max_autotune": True})[1] == {"max_autotune": True}
