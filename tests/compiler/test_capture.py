"""Blocks are found by their weights' shapes, traced once a kind, put back; what must not be fused is left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dsmoe_compiler import api
from dsmoe_compiler.blocks import find_blocks
from dsmoe_compiler.capture import Capture
from dsmoe_compiler.config import CompileConfig
from dsmoe_model.attention import KVCache
from dsmoe_model.presets import preset
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.errors import ConfigError, NotFusedError
from tests.compiler.test_backend import SMALL
from tests.passes.loops import Loop, inputs


def model(**changes: object) -> Transformer:
    return build(replace(SMALL, num_hidden_layers=4, **changes), seed=2)  # type: ignore[arg-type]


def captured(transformer: Transformer) -> Capture:
    capture = Capture(transformer, batch=1, capacity=16)
    for _ in capture.phases():
        pass
    return capture


def test_blocks_are_found_without_names() -> None:
    assert [name for name, _ in find_blocks(model())] == ["layers.1.mlp", "layers.2.mlp", "layers.3.mlp"]
    assert [name for name, _ in find_blocks(Loop())] == [""]
    assert find_blocks(nn.Linear(3, 3)) == []


def test_one_trace_serves_all_layers_and_both_phases_are_eagers() -> None:
    transformer = model()
    capture = captured(transformer)
    explanation = capture.explanation()
    assert [layer.operator for layer in explanation.layers] == ["dsmoe::moe"] * 3
    assert sum(p.name == "match_experts" and p.rewritten == 1 for p in explanation.passes) == 1
    assert "forward" not in vars(transformer.layers[1].mlp)  # the swap is undone
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    ours, theirs = (KVCache.zeros(transformer.config, 1, 16, torch.float32) for _ in range(2))
    with torch.no_grad():
        logits, experts = capture.graphs["prefill"](ids, ours.key, ours.value)
        out = transformer(ids, theirs, last_only=True)
        assert torch.equal(experts, torch.stack([r.experts_TK for r in out.routing]))
        assert (logits - out.logits_BSV[:, 0]).norm() <= 1e-5 * logits.norm()
        at = torch.tensor([5])
        logits, _ = capture.graphs["decode"](ids[:, :1], at, ours.key, ours.value)
        out = transformer(ids[:, :1], theirs, at)
        assert (logits - out.logits_BSV[:, 0]).norm() <= 1e-5 * logits.norm()


def test_hooks_and_shared_weights_are_left_alone_and_reported() -> None:
    transformer = model()
    transformer.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    transformer.layers[3].mlp.experts.down_proj = transformer.layers[2].mlp.experts.down_proj
    layers = api.explain(transformer).layers
    assert [layer.fused for layer in layers] == [False, False, False]
    assert "layers.1.mlp.experts has hooks" in (layers[0].reason or "")
    assert "is the same parameter as" in (layers[1].reason or "")
    assert "is the same parameter as" in (layers[2].reason or "")


def test_hooks_on_one_layer_leave_the_others_fused() -> None:
    transformer = model()
    transformer.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    assert [layer.fused for layer in api.explain(transformer).layers] == [False, True, True]
    with pytest.raises(
        NotFusedError, match=r"1 layers were left alone; layers\.1\.mlp: layers\.1\.mlp\.experts has hooks"
    ):
        api.compile(transformer, config=CompileConfig(target="cpu", strict=True, max_seq_len=16))


def test_layers_of_other_settings_are_traced_apart() -> None:
    transformer = model()
    transformer.layers[2].mlp.router.config = replace(transformer.config, norm_topk_prob=True)
    patterns = [layer.pattern for layer in api.explain(transformer).layers]
    assert ["renormalised" in pattern for pattern in patterns] == [False, True, False]


def test_a_preset_is_explained_without_allocating_it() -> None:
    explanation = api.explain(replace_experts("gshard-137b"))
    assert all(layer.fused for layer in explanation.layers)


def replace_experts(name: str) -> Transformer:
    """The preset on the meta device with four layers: its widths would not fit this machine."""
    config = replace(preset(name), num_hidden_layers=4)
    return build(config, dtype=torch.bfloat16, device="meta", seed=0)


def test_hash_routing_fuses_the_experts_and_says_why_no_more() -> None:
    config = replace(preset("hash-2b"), num_hidden_layers=2, n_routed_experts=4)
    (first, *_) = api.explain(build(config, dtype=torch.float32, device="meta", seed=0)).layers
    assert (first.fused, first.operator) == (True, "dsmoe::experts")
    assert "no GEMM" in (first.reason or "")


def test_any_module_is_explained_on_the_inputs_of_a_call() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = Loop(), Loop("unweighted")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bad(self.good(x)[0])[0]

    explanation = api.explain(Stack(), (inputs(),))
    good, bad = explanation.layers
    assert (good.name, good.fused) == ("good", True)
    assert (bad.name, bad.fused) == ("bad", False)
    assert "not multiplied by its routing weight" in (bad.reason or "")
    assert bad.node in str(explanation)
    with pytest.raises(ConfigError, match="takes example_inputs"):
        api.explain(Stack())


def test_debug_mode_compares_numbers_after_each_pass() -> None:
    capture = Capture(model(), batch=1, capacity=16, debug=True)
    assert all(raised.graph is not None for _, raised in capture.raise_layers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "target is 'tpu'; it must be one of cpu, cuda"),
        ({"formats": ("tensorrt",)}, "this version writes aoti, onnx, mlir"),
        ({"formats": ("aoti", "onnx")}, "an artifact has one format"),
        ({"formats": ("onnx",), "profile": "ort-rocm"}, "profile is 'ort-rocm'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_seq_len": True}, "max_seq_len is True"),
    ],
)
def test_a_bad_option_is_refused_with_its_value(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompileConfig(**({"target": "cpu"} | options))


def test_a_cache_longer_than_the_model_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="max_seq_len is 1024, but the model's max_position_embeddings is 512"):
        CompileConfig(target="cpu", max_seq_len=1024).capacity(SMALL.max_position_embeddings)
