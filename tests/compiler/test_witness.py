"""transformers' own classes with the same weights give the same numbers, within a budget from float64."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.witness import block_to_transformers, to_transformers
from dsmoe_model.checkpoint import load_checkpoint, load_moe_block, save_checkpoint
from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import assert_within_budget, row_error

pytest.importorskip("transformers")

V1 = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=176,
    max_position_embeddings=64,
    rope_theta=5000.0,
    initializer_range=0.125,  # 1 / sqrt(hidden_size): outputs of the order of their inputs
    n_routed_experts=15,
    n_shared_experts=2,
    num_experts_per_tok=4,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
)
V2_GROUPS = replace(V1, n_routed_experts=16, n_group=4, topk_group=2, routed_scaling_factor=16.0)
V3 = replace(
    V2_GROUPS,
    scoring_func="sigmoid",
    selection_bias=True,
    group_score="top2",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)


def ids(count: int = 40) -> torch.Tensor:
    return torch.randint(0, V1.vocab_size, (2, count), generator=torch.Generator().manual_seed(1))


def moe_inputs(rows: int = 64) -> torch.Tensor:
    return torch.randn(2, rows // 2, V1.hidden_size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("experts_implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("config", [V1, V2_GROUPS], ids=["v1", "v2 groups"])
def test_whole_model_gives_the_same_logits(config: ModelConfig, experts_implementation: str) -> None:
    model = build(config, seed=4)
    witness = to_transformers(model, experts_implementation=experts_implementation)
    theirs, ours = witness(ids()), model(ids()).logits_BSV
    exact = build(config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = exact(ids()).logits_BSV
    assert 0.3 < truth.std() < 30
    assert row_error(theirs, truth).max() < 1e-4  # routing agrees on these inputs, so values must
    assert_within_budget(ours, eager=theirs, exact=truth)


@torch.no_grad()
def test_the_witness_can_fail() -> None:
    """Gate and up swapped in one layer of one expert stack is far outside the budget."""
    model = build(V1, seed=4)
    theirs = to_transformers(model)(ids()).clone()
    exact = build(V1, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    stack = model.layers[2].mlp.experts.gate_up_proj
    stack.copy_(stack.roll(V1.moe_intermediate_size, dims=1))
    with pytest.raises(AssertionError, match="rows are over"):
        assert_within_budget(model(ids()).logits_BSV, eager=theirs, exact=exact(ids()).logits_BSV)


@torch.no_grad()
def test_checkpoint_of_deepseek_ocr2_text(tmp_path: Path) -> None:
    """A folder written from transformers' side, its config included, loads here and gives the same logits."""
    from safetensors.torch import save_file

    model = build(V1, seed=6)
    witness = to_transformers(model)
    witness.model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deepseek_ocr2_text"
    save_file({name: t.contiguous() for name, t in witness.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded(ids()).logits_BSV, model(ids()).logits_BSV)


def their_folder(config: ModelConfig, folder: Path, *, packed: bool) -> Path:
    """A V2 or V3 checkpoint as transformers saves it: latent attention and all, outputs of order 1."""
    if config.scoring_func == "sigmoid":
        from transformers import DeepseekV3Config as Config
        from transformers import DeepseekV3ForCausalLM as Model
    else:
        from transformers import DeepseekV2Config as Config
        from transformers import DeepseekV2ForCausalLM as Model
    theirs = Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=config.n_routed_experts,
        n_shared_experts=config.n_shared_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        first_k_dense_replace=1,
        n_group=config.n_group,
        topk_group=config.topk_group,
        topk_method="greedy" if config.n_group == 1 else "group_limited_greedy",
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
        initializer_range=0.125,
    )
    if config.scoring_func == "sigmoid":
        del theirs.topk_method
    torch.manual_seed(7)
    model = Model(theirs)
    gate = model.model.layers[1].mlp.gate
    if config.selection_bias:
        gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, config.n_routed_experts))
    model.save_pretrained(folder, max_shard_size="60KB")
    if packed:
        from safetensors.torch import save_file

        for path in folder.glob("model*"):
            path.unlink()
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["one tensor per expert", "stacked"])
@pytest.mark.parametrize("config", [V1, V2_GROUPS, V3], ids=["v2 greedy", "v2 groups", "v3"])
def test_blocks_of_v2_and_v3(config: ModelConfig, packed: bool, tmp_path: Path) -> None:
    """DeepseekV2Moe and DeepseekV3MoE, weights through their checkpoint and our reader."""
    from transformers import AutoModelForCausalLM

    folder = their_folder(config, tmp_path / "theirs", packed=packed)
    with pytest.raises(ValueError, match="latent"):
        load_checkpoint(folder)
    block = load_moe_block(folder, 1)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[1].mlp
    exact = load_moe_block(folder, 1, dtype=torch.float64)
    x = moe_inputs()
    truth, _ = exact(x.double())
    assert 0.1 < truth.std() < 30
    assert_within_budget(block(x)[0], eager=reference(x), exact=truth)
    assert_within_budget(block(x)[0], eager=block_to_transformers(block, config)(x), exact=truth)


def test_dense_layer_is_no_block(tmp_path: Path) -> None:
    folder = save_checkpoint(build(V1), tmp_path / "out")
    for layer in (0, 3, -1):
        with pytest.raises(ValueError, match=f"layer {layer} .*no experts"):
            load_moe_block(folder, layer)
    assert isinstance(load_moe_block(folder, 1), MoE)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"head_dim": 32}, "head_dim = 32"),
        ({"hidden_act": "silu_clamped"}, "hidden_act"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0"),
    ],
)
def test_what_the_witness_cannot_express_is_refused(change: dict[str, object], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        to_transformers(Transformer(replace(V1, **change)))
