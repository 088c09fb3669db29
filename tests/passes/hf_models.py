"""Tiny random models of transformers, and the graphs that torch.compile hands to the back end for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dsmoe_compiler import backend
from dsmoe_compiler.huggingface import eager_loop
from dsmoe_passes.canonicalise import canonicalise

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
VISION = {
    "sam_config": {
        "hidden_size": 8,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "window_size": 2,
        "global_attn_indexes": [0],
        "downsample_channels": [8, 8],
    },
    "encoder_config": {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT
    | {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": LATENT
    | {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
    },
    "deepseek_ocr2": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 8},
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 2.5,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
}


def tiny(
    family: str, *, dtype: torch.dtype = torch.float32, experts_implementation: str = "grouped_mm", **changes: Any
) -> nn.Module:
    """A model of two mixture-of-experts layers for causal language modelling, in eval mode, outputs about 1."""
    values = COMMON | FAMILIES[family] | changes
    if family == "deepseek_ocr2":
        config = transformers.DeepseekOcr2Config(text_config=values, vision_config=VISION, image_token_id=95)
        build = transformers.DeepseekOcr2ForConditionalGeneration
    else:
        config = transformers.CONFIG_MAPPING[family](**values)
        build = transformers.AutoModelForCausalLM.from_config
    return seeded(build(config), dtype, experts_implementation)


def seeded(model: nn.Module, dtype: torch.dtype, experts_implementation: str) -> nn.Module:
    """`model` with the same random weights on every call: divided by the square root of the fan-in, biases small."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (tensor.dim() > 1 or "bias" in name or "sinks" in name):
                fan_in = 1 if "embed" in name else tensor.shape[-1] if tensor.dim() > 1 else 16
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
    model.set_experts_implementation(experts_implementation)
    return model.to(dtype).eval()


def prompt(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def captured(model: nn.Module, *inputs: Any, grad: bool = False, **named: Any) -> list[tuple[fx.GraphModule, list]]:
    """The functional graphs that torch.compile hands to the back end, and their inputs, in the order of capture."""
    found: list[tuple[fx.GraphModule, list]] = []

    @eager_loop.traces_eager_experts
    def keep(gm: fx.GraphModule, example_inputs: list) -> Any:
        graph = backend.functional(gm, example_inputs)
        found.append((graph, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    eager_loop.install()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=keep)(*inputs, **named)
    return found


def canonical(model: nn.Module, *inputs: Any, **named: Any) -> list[fx.GraphModule]:
    """The graphs of `model` on `inputs`, made canonical and not compiled."""
    graphs = [graph for graph, _ in captured(model, *inputs, **named)]
    for graph in graphs:
        canonicalise(graph)
        graph.recompile()
    return graphs


def layers(model: nn.Module) -> int:
    """How many layers with routed experts `model` has."""
    return sum(type(module).__name__.endswith("Experts") for module in model.modules())
