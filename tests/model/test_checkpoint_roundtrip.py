"""Saved and loaded again: the same bits, in the official names, readable by the safetensors library."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsmoe_model.checkpoint import load_checkpoint, load_moe_block, open_checkpoint, save_checkpoint
from dsmoe_model.checkpoint.layouts import model_slots
from dsmoe_model.config import ModelConfig
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import build

SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=40,
    max_position_embeddings=32,
    n_routed_experts=6,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=10,
    first_k_dense_replace=1,
    aux_loss_alpha=0.001,
    bos_token_id=48,
    eos_token_id=49,
)
NO_EXPERTS = {"n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
SYSTEMS = {
    "deepseek": SMALL,
    "llama": replace(SMALL, **NO_EXPERTS, first_k_dense_replace=0, aux_loss_alpha=0.0, rope_theta=5e5),
    "llama tied": replace(SMALL, **NO_EXPERTS, tie_word_embeddings=True),
    "v3 gate": replace(
        SMALL,
        scoring_func="sigmoid",
        selection_bias=True,
        group_score="top2",
        n_group=3,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    "hash": replace(SMALL, hash_routing=True, num_experts_per_tok=1, aux_loss_alpha=0.0, n_shared_experts=0),
    "dense x4": replace(SMALL, n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=4),
}


def assert_same_bits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_after_a_round_trip(system: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = SYSTEMS[system]
    model = build(config, dtype=dtype, seed=3)
    folder = save_checkpoint(model, tmp_path / "a folder, ünïcödé 模型", max_shard_bytes=6000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    back = load_checkpoint(folder)
    assert back.config == config
    assert not back.training
    assert_same_bits(model, back)
    if config.tie_word_embeddings:
        assert back.lm_head.weight is back.embed_tokens.weight


def test_selection_bias_keeps_float32_and_its_values(tmp_path: Path) -> None:
    model = build(SYSTEMS["v3 gate"], dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 6) / 3
    model.layers[1].mlp.router.e_score_correction_bias.copy_(bias)
    back = load_checkpoint(save_checkpoint(model, tmp_path / "out"))
    assert torch.equal(back.layers[1].mlp.router.e_score_correction_bias, bias)


def test_dtype_asked_for(tmp_path: Path) -> None:
    model = build(SMALL, seed=1)
    folder = save_checkpoint(model, tmp_path / "out")
    assert_same_bits(load_checkpoint(folder, dtype=torch.bfloat16), model.to(torch.bfloat16))


def test_official_16b_names() -> None:
    """All 5,466 names of deepseek-moe-16b and their shapes, as section 4.2 of the published module tree lists them."""
    slots = {slot.name: slot.shape for slot in model_slots(PRESETS["deepseek-moe-16b"])}
    wide, expert, shared, dense = (2048,), (1408, 2048), (2816, 2048), (10944, 2048)
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (102400, 2048),
        "lm_head.weight": (102400, 2048),
        "model.norm.weight": wide,
    }

    def ffn(at: str, shape: tuple[int, int]) -> None:
        expected[f"{at}.gate_proj.weight"] = expected[f"{at}.up_proj.weight"] = shape
        expected[f"{at}.down_proj.weight"] = shape[::-1]

    for layer in range(28):
        at = f"model.layers.{layer}"
        expected[f"{at}.input_layernorm.weight"] = expected[f"{at}.post_attention_layernorm.weight"] = wide
        expected.update({f"{at}.self_attn.{part}_proj.weight": (2048, 2048) for part in "qkvo"})
        if layer == 0:
            ffn(f"{at}.mlp", dense)
            continue
        expected[f"{at}.mlp.gate.weight"] = (64, 2048)
        ffn(f"{at}.mlp.shared_experts", shared)
        for number in range(64):
            ffn(f"{at}.mlp.experts.{number}", expert)
    assert len(slots) == 5466
    assert slots == expected


def test_every_parameter_is_filled_exactly_once() -> None:
    for config in SYSTEMS.values():
        model = build(config, device="meta")
        places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        filled: Counter[str] = Counter()
        for slot in model_slots(config):
            view = slot.view(places)
            assert view.shape == slot.shape
            filled[slot.parameter] += view.numel()
        assert filled == {name: tensor.numel() for name, tensor in places.items()}


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    model = build(SMALL, dtype=torch.bfloat16)
    folder = save_checkpoint(model, tmp_path / "out")
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        up = file.get_tensor("model.layers.2.mlp.experts.4.up_proj.weight")
    assert torch.equal(up, model.layers[2].mlp.experts.gate_up_proj[4, 10:])


def test_packed_experts_and_names_without_prefix(tmp_path: Path) -> None:
    """transformers' in-memory form: stacked experts, and the bare text model's names."""
    model = build(SMALL, seed=5)
    folder = save_checkpoint(model, tmp_path / "out")
    tensors = {name.replace("router.", "gate."): tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    assert_same_bits(load_checkpoint(folder), model)
    assert_same_bits(load_moe_block(folder, 2), model.layers[2].mlp)


def test_rotary_constants_of_old_llama_files_are_said_and_not_read(tmp_path: Path) -> None:
    model = build(SYSTEMS["llama"])
    folder = save_checkpoint(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    assert any("inv_freq" in note for note in open_checkpoint(folder).notes)
    assert_same_bits(load_checkpoint(folder), model)


def test_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    model = build(SYSTEMS["llama tied"])
    folder = save_checkpoint(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert any("lm_head.weight" in note for note in open_checkpoint(folder).notes)


def test_hub_cache_snapshot_of_links(tmp_path: Path) -> None:
    """What `hf download` leaves in its cache: links from snapshots/<revision> into blobs of the same repository."""
    folder = save_checkpoint(build(SMALL), tmp_path / "plain")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f1e"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    assert open_checkpoint(snapshot).config == SMALL


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = save_checkpoint(build(SMALL), tmp_path / "out")
    seen: list[tuple[int, int]] = []
    load_checkpoint(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (open_checkpoint(folder).nbytes, open_checkpoint(folder).nbytes)


def test_saving_overwrites_nothing_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(build(SMALL), tmp_path / "out")
    before = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="not an empty folder"):
        save_checkpoint(build(SMALL), folder)
    assert (folder / "config.json").read_text() == before

    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(build(SMALL), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_nan_weights_are_named(tmp_path: Path) -> None:
    model = build(SMALL)
    with torch.no_grad():
        model.layers[1].mlp.experts.down_proj[3, 2, 2] = float("nan")
        model.norm.weight[0] = float("inf")
    folder = save_checkpoint(model, tmp_path / "out")
    with pytest.warns(UserWarning, match=r"2 tensors.*experts\.3\.down_proj.*norm\.weight"):
        load_checkpoint(folder)
