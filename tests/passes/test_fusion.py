"""Gate, experts and shared experts become one operator with packed weights; what is used elsewhere keeps them apart."""

import pytest
import torch
from torch import Tensor, nn

from dsmoe_passes import pipeline
from tests.passes.loops import called, trace
from tests.passes.test_match_router import V3, Layer

MOE = "dsmoe.moe.default"


def fused(module: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, dict[str, object]]:
    gm = trace(module, x, dim=1)
    return gm, {step.result.name: step.result for step in pipeline.run(gm)}


@pytest.mark.parametrize(
    "changes", [{}, {"n_shared_experts": 2}, V3 | {"n_shared_experts": 1, "router_dtype": "activation"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_becomes_one_operator(changes: dict, dtype: torch.dtype) -> None:
    module = Layer(**changes).to(dtype)
    gm, _ = fused(module, torch.randn(1, 6, 16, dtype=dtype))
    (node,) = called(gm, MOE)
    assert {str(n.target) for n in gm.graph.nodes if n.op == "call_function"} <= {
        "aten.view.default",
        "aten.sym_size.int",
        MOE,
        "<built-in function getitem>",
    }
    assert (node.args[-3] is not None) == ("n_shared_experts" in changes)
    router_dtype = (
        "activation" if changes.get("router_dtype") == "activation" and dtype is torch.bfloat16 else "float32"
    )
    assert node.args[12] == router_dtype
    exact = Layer(**changes).to(dtype).double()
    for tokens in (0, 1, 7, 63):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y, experts = gm(x)
        eager, same = module(x)
        assert torch.equal(experts, same)
        y64 = exact.moe(x.double(), None, experts)[0]
        error, budget = (y.double() - y64).norm(dim=-1), (eager.double() - y64).norm(dim=-1)
        scale = y64.norm(dim=-1)
        assert (error <= 2 * budget + torch.finfo(dtype).eps * scale).all()


def test_shared_weights_are_packed_once_and_the_parts_dropped() -> None:
    module = Layer(n_shared_experts=2)
    gm, results = fused(module, torch.randn(1, 6, 16))
    shared = module.moe.shared_experts
    (node,) = called(gm, MOE)
    packed = dict(gm.named_parameters())[node.args[-3].target]
    assert torch.equal(packed, torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
    assert not any("up_proj.weight" in name and "experts.gate_up" not in name for name, _ in gm.named_parameters())
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in module.parameters())
    assert len(results["pack_weights"].rewritten) == 1


class Uses(Layer):
    """The layer, and another use of something on the way."""

    def __init__(self, use: str) -> None:
        super().__init__(n_shared_experts=1)
        self.use = use

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.use in ("routing weights", "scores"):
            y, routing = self.moe(x)
            return y, routing.weights_TK if self.use == "routing weights" else routing.scores_TE
        flat = x.reshape(-1, 16)
        routing = self.moe.router(flat)
        routed = self.moe.experts(flat, routing.weights_TK, routing.experts_TK)
        if self.use == "shared reads another input":
            return (routed + self.moe.shared_experts(flat * 2),)
        if self.use == "shared is subtracted":
            return (routed - self.moe.shared_experts(flat),)
        up, down = self.moe.shared_experts.up_proj(flat), self.moe.shared_experts.down_proj
        gate = self.moe.shared_experts.gate_proj(flat)
        if self.use == "shared hidden used":
            return routed + down(nn.functional.silu(gate) * up), up.sum()
        assert self.use == "shared gelu"
        return (routed + down(nn.functional.gelu(gate) * up),)


KEPT_APART = {
    "routing weights": ("fuse_moe", "the routing weights have another user"),
    "scores": ("fuse_moe", "the logits have another user"),
    "shared reads another input": ("match_shared", "the shared experts read"),
    "shared hidden used": ("match_shared", "has another user"),
    "shared gelu": ("match_shared", "activation is not the routed experts' silu"),
}


@pytest.mark.parametrize("use", KEPT_APART)
def test_what_is_used_elsewhere_is_not_fused_away(use: str) -> None:
    module, x = Uses(use), torch.randn(1, 6, 16)
    gm, results = fused(module, x)
    name, because = KEPT_APART[use]
    assert any(because in refusal.because for refusal in results[name].refused), results[name]
    for ours, theirs in zip(gm(x), module(x), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_difference_is_no_sum() -> None:
    module, x = Uses("shared is subtracted"), torch.randn(1, 6, 16)
    gm, _ = fused(module, x)
    (node,) = called(gm, MOE)
    assert node.args[-3] is None
    assert (gm(x)[0] - module(x)[0]).norm() <= 1e-5 * module(x)[0].norm()


def test_the_pipeline_catches_a_pass_that_breaks_a_graph() -> None:
    def flatten_output(gm: torch.fx.GraphModule) -> pipeline.PassResult:
        output = gm.graph.output_node()
        first = output.args[0][0]
        with gm.graph.inserting_before(output):
            cast = gm.graph.call_function(torch.ops.aten._to_copy.default, (first,), {"dtype": torch.float64})
        cast.meta["val"] = first.meta["val"].double()
        output.args = ((cast, *output.args[0][1:]),)
        return pipeline.PassResult("flatten_output")

    with pytest.raises(RuntimeError, match="flatten_output changed the outputs"):
        pipeline.run(trace(Layer(), torch.randn(1, 6, 16), dim=1), passes=(flatten_output,))


def test_debug_mode_catches_a_pass_that_changes_numbers() -> None:
    def scale_weights(gm: torch.fx.GraphModule) -> pipeline.PassResult:
        with torch.no_grad():
            next(p for n, p in gm.named_parameters() if "down_proj" in n).mul_(1.02)
        return pipeline.PassResult("scale_weights")

    x = torch.randn(1, 6, 16)
    gm = trace(Layer(), x, dim=1)
    with pytest.raises(RuntimeError, match="scale_weights changed output 0"):
        pipeline.run(gm, passes=(scale_weights,), probe=lambda graph: [graph(x)[0].detach()])
    pipeline.run(trace(Layer(), x, dim=1), probe=lambda graph: [graph(x)[0].detach()])


def test_dumps_show_the_graph_before_and_after() -> None:
    steps = pipeline.run(trace(Layer(), torch.randn(1, 6, 16), dim=1), dump="match_experts")
    (dumped,) = [step for step in steps if step.graph_before is not None]
    assert dumped.result.name == "match_experts"
    assert "aten.index_add" in dumped.graph_before
    assert "dsmoe.experts" in dumped.graph_after
    assert "aten.index_add" not in dumped.graph_after
