"""Models for the tests of ONNX artifacts: small, with outputs about 1, of every kind of gate."""

from __future__ import annotations

from typing import Any

import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.artifact import Artifact
from dsmoe_model.transformer import Transformer
from tests.compiler.stand_in import model_of

GATES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    "v3": {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "top2",
        "scoring_func": "sigmoid",
        "selection_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "switch": {"num_experts_per_tok": 1, "n_shared_experts": 0, "first_k_dense_replace": 0},
    "hash": {"num_experts_per_tok": 1, "hash_routing": True},
    "gpt_oss": {"hidden_act": "swiglu_oai"},
    "dense": {"n_routed_experts": 0, "num_experts_per_tok": 0},
}


def gate_model(gate: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """Two layers, the first dense where the family has that; V3's selection bias is not zero."""
    model = model_of(dtype, num_hidden_layers=2, **GATES[gate])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def exported(model: Any, **options: Any) -> Artifact:
    """Compiled and proved."""
    config = dsmoe.CompileConfig(formats=("onnx",), strict=True, **options)
    return dsmoe.compile(model, config=config, progress=lambda _: None)
