"""`config.json` of the published families, and configs that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_model.checkpoint.config_json import CheckpointConfig, config_json, read_config
from dsmoe_model.checkpoint.json_files import read_json
from dsmoe_model.errors import CheckpointError, ConfigError
from dsmoe_model.presets import PRESETS

OFFICIAL_16B: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}
V3 = {
    **OFFICIAL_16B,
    "model_type": "deepseek_v3",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rope_scaling": {"type": "yarn", "factor": 40},
}
del V3["scoring_func"]


def read(folder: Path, config: dict[str, Any], **options: bool) -> CheckpointConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder, **options)


def test_official_16b_is_the_preset(tmp_path: Path) -> None:
    found = read(tmp_path, OFFICIAL_16B)
    preset = PRESETS["deepseek-moe-16b"].to_dict()
    differs = {name for name, value in found.config.to_dict().items() if value != preset[name]}
    assert differs <= {"initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id"}
    assert any("auto_map" in note and "not used" in note for note in found.notes)


@pytest.mark.parametrize("name", PRESETS)
def test_written_config_reads_back(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, config_json(PRESETS[name], "bfloat16")).config == PRESETS[name]


def test_latent_attention_is_refused_whole_but_its_blocks_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_lora_rank = 512.*latent attention.*load_moe_block"):
        read(tmp_path, V3)
    with pytest.raises(ConfigError, match="kv_lora_rank = 512"):
        read(tmp_path, {**OFFICIAL_16B, "kv_lora_rank": 512})
    gate = read(tmp_path, V3, block_only=True).config
    assert (gate.scoring_func, gate.group_score, gate.selection_bias) == ("sigmoid", "top2", True)
    assert (gate.n_group, gate.topk_group, gate.routed_scaling_factor, gate.norm_topk_prob) == (8, 4, 2.5, True)


def test_gates_of_v2(tmp_path: Path) -> None:
    v2 = {**V3, "model_type": "deepseek_v2", "norm_topk_prob": False, "topk_method": "group_limited_greedy"}
    gate = read(tmp_path, v2, block_only=True).config
    assert (gate.scoring_func, gate.group_score, gate.selection_bias, gate.n_group) == ("softmax", "max", False, 8)
    greedy = read(
        tmp_path, {**v2, "topk_method": "greedy", "n_group": None, "topk_group": None}, block_only=True
    ).config
    assert (greedy.n_group, greedy.topk_group) == (1, 1)
    with pytest.raises(ConfigError, match="renormalises"):
        read(tmp_path, {**v2, "norm_topk_prob": True}, block_only=True)
    with pytest.raises(ConfigError, match="deepseek_v3' lacks n_group"):
        read(tmp_path, {key: value for key, value in V3.items() if key != "n_group"}, block_only=True)


def test_what_hugging_face_leaves_out_is_derived(tmp_path: Path) -> None:
    llama = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "eos_token_id": [3, 4],
        "mystery": 1,
    }
    found = read(tmp_path, llama)
    config = found.config
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.eos_token_id) == (8, 8, 500000.0, 3)
    assert any("first entry, 3" in note for note in found.notes)
    assert any("mystery" in note for note in found.notes)


def test_ocr2_text(tmp_path: Path) -> None:
    ocr = {**OFFICIAL_16B, "model_type": "deepseek_ocr2_text", "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 25}
    del ocr["first_k_dense_replace"]
    assert read(tmp_path, ocr).config.first_k_dense_replace == 3
    with pytest.raises(ConfigError, match="dense layers first"):
        read(tmp_path, {**ocr, "mlp_layer_types": ["sparse", "dense"] * 14})
    with pytest.raises(ConfigError, match="3 entries"):
        read(tmp_path, {**ocr, "mlp_layer_types": ["sparse"] * 3})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "billion experts": ({"n_routed_experts": 10**9}, "n_routed_experts = 1000000000"),
    "huge integer": ({"n_routed_experts": 10**4000}, "n_routed_experts"),
    "negative width": ({"hidden_size": -1}, "hidden_size = -1"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "string for integer": ({"num_hidden_layers": "28"}, "num_hidden_layers must be an integer, got '28'"),
    "bool for integer": ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
    "object for integer": ({"vocab_size": {"a": 1}}, "vocab_size"),
    "integer for bool": ({"norm_topk_prob": 1}, "norm_topk_prob"),
    "k beyond E": ({"num_experts_per_tok": 65}, "num_experts_per_tok = 65 exceeds n_routed_experts = 64"),
    "groups": ({"n_group": 2, "topk_group": 3}, "topk_group = 3 exceeds n_group = 2"),
    "rope scaling": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    "rope type": ({"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
    "rope kind": ({"rope_parameters": "x"}, "rope_parameters must be an object"),
    "attention bias": ({"attention_bias": True}, "attention_bias = True"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    "family": ({"model_type": "gpt2"}, "model_type 'gpt2'.*known: deepseek"),
    "no family": ({"model_type": None}, "model_type"),
    "missing": ({"vocab_size": None}, "lacks vocab_size"),
    "gate": ({"scoring_func": "cosine"}, "scoring_func"),
    "method": ({"topk_method": "magic"}, "topk_method = magic"),
    "llama with experts": ({"model_type": "llama"}, "dense, but n_routed_experts = 64"),
    "long text": ({"scoring_func": "x" * 10**6}, "scoring_func"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, pattern = REFUSED[case]
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    (tmp_path / "config.json").write_text("")
    text = json.dumps({**OFFICIAL_16B, **{k: v for k, v in change.items() if v != 10**4000}})
    if case == "huge integer":
        text = text.replace('"n_routed_experts": 64', '"n_routed_experts": ' + "9" * 4000)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=pattern) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1500


def test_bombs_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 500_000 + "]" * 500_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_config(tmp_path)
    path.write_text('{"vocab_size": ' + "9" * 100_000 + "}")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
    path.write_text('{"vocab_size": 1, "vocab_size": 2}')
    with pytest.raises(CheckpointError, match="'vocab_size' twice"):
        read_config(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse: 1 GB that takes no room
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"read {self}"))
    with pytest.raises(CheckpointError, match=r"1,073,741,824 bytes.*refused unread"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="refused unread"):
        read_json(path, limit=10)
