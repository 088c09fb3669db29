"""What keeps a gate and its experts two operators, each with its reason; what is used by nobody does not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.loops import called
from tests.passes.test_gate_spellings import EXPERTS, MOE, ROUTE, H, K, Layer, Routing, raised


def doubled_router(m: Layer, x: Tensor) -> Routing:
    return F.linear(x, m.router * 2).softmax(-1).topk(K)  # type: ignore[return-value]


class Uses(Layer):
    """The layer; `use(self, x, logits, weights, experts, y)` makes something of what is on the way."""

    def __init__(self, use: Callable[..., Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__(doubled_router)
        self.use, self.dtype = use, dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        flat = x.reshape(-1, H)
        logits = F.linear(flat.float(), self.router.float())
        scores = logits if self.dtype is None else logits.to(self.dtype)
        weights, experts = scores.softmax(-1).topk(K)
        early = self.use(self, flat, logits, weights, experts)
        y = torch.ops.dsmoe.experts(
            flat, experts, weights, self.gate_up, self.down, None, None, "silu", 0.0, 0.0, "concat"
        )
        return y, early


KEPT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "logits": (lambda m, x, logits, w, e: logits, "the logits have another user, output"),
    "loss on scores": (lambda m, x, logits, w, e: logits.softmax(-1).mean(0), "the logits have another user, softmax"),
    "weights": (lambda m, x, logits, w, e: w.sum(), "the routing weights have another user, sum"),
    "ids before": (lambda m, x, logits, w, e: (e == 1).sum(), "the expert ids are used by eq"),
}


@pytest.mark.parametrize("use", KEPT)
def test_what_is_used_keeps_them_apart(use: str) -> None:
    write, because = KEPT[use]
    module, x = Uses(write), torch.randn(1, 6, H)
    gm, routed, fused = raised(module, x)
    assert len(routed.rewritten) == 1
    (refusal,) = fused.refused
    assert because in refusal.because, refusal.because
    assert len(called(gm, ROUTE)) == len(called(gm, EXPERTS)) == 1
    for ours, eager in zip(gm(x), module(x), strict=True):
        assert torch.equal(ours, eager)


def test_weights_that_others_read_keep_the_dtype_that_they_had() -> None:
    module = Uses(lambda m, x, logits, w, e: w * 2, torch.bfloat16).bfloat16()
    x = torch.randn(1, 6, H, dtype=torch.bfloat16)
    gm, routed, _ = raised(module, x)
    assert len(routed.rewritten) == 1
    weights = gm(x)[1]
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, module(x)[1])


def unused(m: Layer, x: Tensor, logits: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    logits.softmax(-1).mean(0).mul(experts.sum())
    weights.sum()
    return x.sum()


def test_what_nobody_uses_does_not_keep_them_apart() -> None:
    gm, _, fused = raised(Uses(unused), torch.randn(1, 6, H))
    assert not fused.refused
    assert len(called(gm, MOE)) == 1


def test_a_float32_gate_scored_in_bfloat16_is_neither_of_the_two_router_dtypes() -> None:
    module = Uses(lambda m, x, logits, w, e: x.sum(), torch.bfloat16).bfloat16()
    x = torch.randn(1, 6, H, dtype=torch.bfloat16)
    gm, routed, fused = raised(module, x)
    assert len(routed.rewritten) == 1
    (refusal,) = fused.refused
    assert "multiplies in torch.float32 and scores in torch.bfloat16" in refusal.because
    assert torch.equal(gm(x)[0], module(x)[0])


def test_a_router_weight_that_is_computed_keeps_them_apart() -> None:
    _, routed, fused = raised(Layer(doubled_router), torch.randn(1, 6, H))
    assert len(routed.rewritten) == 1
    (refusal,) = fused.refused
    assert "the gate's weight or bias is computed in the graph" in refusal.because
