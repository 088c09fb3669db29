"""Hostile and broken folders are refused by name, before a shard is opened or a weight allocated."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsmoe_model.checkpoint import index as index_module
from dsmoe_model.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from dsmoe_model.checkpoint.shards import HEADER_LIMIT, read_header
from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import CheckpointError, ConfigError
from dsmoe_model.transformer import build

INDEX = "model.safetensors.index.json"
CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=12,
    max_position_embeddings=16,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    first_k_dense_replace=1,
)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_checkpoint(build(CONFIG), tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_checkpoint(build(CONFIG), tmp_path / "sharded", max_shard_bytes=3000)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(folder: Path, pattern: str, error: type[ValueError] = CheckpointError) -> None:
    with pytest.raises(error, match=pattern) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 2000


# Row 31: names in the index


@pytest.mark.parametrize(
    "shard",
    [
        "../outside/w.safetensors",
        "/etc/passwd",
        "sub/w.safetensors",
        "..\\w.safetensors",
        "C:w.safetensors",
        "https://example.org/w.safetensors",
        "w\0.safetensors",
        "w\n.safetensors",
        "~/w.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "x" * 5000,
        None,
        7,
        ["model.safetensors"],
    ],
)
def test_shard_names(sharded: Path, shard: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "read_header", lambda path: pytest.fail(f"opened {path}"))
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    refused(sharded, "lm_head.weight")


def test_shard_that_links_out(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    monkeypatch.setattr(index_module, "read_header", lambda path: pytest.fail(f"opened {path}"))
    refused(sharded, f"{shard.name}.*link to.*outside")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_files_that_link_out(single: Path, tmp_path: Path, name: str) -> None:
    (single / name).rename(tmp_path / "outside")
    (single / name).symlink_to(tmp_path / "outside")
    refused(single, f"{name}.*link to")


def test_snapshot_folder_that_links_past_its_blobs(single: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f1e"
    snapshot.parent.mkdir(parents=True)
    single.rename(snapshot)
    (snapshot / "model.safetensors").rename(tmp_path / "models--a--b" / "secret")
    (snapshot / "model.safetensors").symlink_to("../../secret")
    refused(snapshot, "link to")


def test_pipe_in_place_of_a_shard(single: Path) -> None:
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    refused(single, "not a regular file")


# Row 30: headers


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    body = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header["model.embed_tokens.weight"]


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "overlap": (lambda h: h["lm_head.weight"].update(data_offsets=[0, 640]), "overlaps|gap"),
    "outside": (lambda h: h["lm_head.weight"].update(data_offsets=[10**12, 10**12 + 640]), "gap"),
    "backwards": (lambda h: first(h).update(data_offsets=[640, 0]), "span -640"),
    "negative": (lambda h: first(h).update(data_offsets=[-1, 639]), "not a list of sizes"),
    "bool": (lambda h: first(h).update(shape=[True, 160]), "not a list of sizes"),
    "float": (lambda h: first(h).update(shape=[20.0, 8]), "not a list of sizes"),
    "huge": (lambda h: first(h).update(shape=[2**62, 2**62]), "needs .* bytes"),
    "too many dimensions": (lambda h: first(h).update(shape=[1] * 100000), "wrong length"),
    "unknown dtype": (lambda h: first(h).update(dtype="X" * 10000), "not known"),
    "no shape": (lambda h: first(h).pop("shape"), "exactly dtype, shape"),
    "list": (lambda h: h.update({"lm_head.weight": [1, 2]}), "exactly dtype, shape"),
    "duplicate key": (lambda h: json.dumps(h).encode()[:-1] + b', "lm_head.weight": {}}', "lm_head.weight' twice"),
    "not an object": (lambda h: b"[1]", "object was expected"),
    "not JSON": (lambda h: b"{" * 64, "not valid JSON"),
    "not UTF-8": (lambda h: b'{"\xff": 1}', "not valid JSON"),
    "deep": (lambda h: b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "NaN": (lambda h: b'{"a": NaN}', "not JSON"),
    "empty": (lambda h: b"{}", "describes"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(single: Path, case: str) -> None:
    change, pattern = HEADERS[case]
    rewrite_header(single / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(single / "model.safetensors")
    refused(single, pattern)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**6])
def test_header_length_beyond_the_file(single: Path, length: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(single, "truncated or not safetensors")


def test_header_length_beyond_the_limit(single: Path) -> None:
    with (single / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)  # sparse: nothing is written or read
    refused(single, "claims a header")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(single, "truncated")


def test_trailing_bytes(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(single, "truncated or padded")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_never_crash(single: Path, data: st.DataObject) -> None:
    """Any byte of header, index or config may be anything: the answer is a checkpoint or a ValueError of ours."""
    path = single / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    original = path.read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, min(len(mutated), 4000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated)
    try:
        open_checkpoint(single)
    except (CheckpointError, ConfigError) as error:
        assert len(str(error)) < 3000  # noqa: PT017
    finally:
        path.write_bytes(original)


# Rows 32 and 33: tensors and shards against config and index

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(EXPERT), rf"{EXPERT} is missing"),
    "extra expert": (
        lambda t: t.update({EXPERT.replace("experts.2", "experts.4"): t[EXPERT].clone()}),
        r"experts\.4\.up_proj\.weight' is in the files but not in the model",
    ),
    "wrong shape": (lambda t: t.update({EXPERT: torch.zeros(6, 9)}), rf"{EXPERT} has shape \[6, 9\].*\[6, 8\]"),
    "transposed": (lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), r"\[8, 6\].*\[6, 8\]"),
    "int8": (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), rf"{EXPERT} has dtype I8"),
    "float8": (lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}), rf"{EXPERT} has dtype F8_E4M3"),
    "int64": (lambda t: t.update({EXPERT: t[EXPERT].long()}), rf"{EXPERT} has dtype I64"),
    "untold bias": (
        lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(4)}),
        "e_score_correction_bias' is in the files",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(single: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, pattern = TENSORS[case]
    tensors = load_file(single / "model.safetensors")
    change(tensors)
    save_file(tensors, single / "model.safetensors")
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match=pattern):
        load_checkpoint(single)


def test_a_config_that_asks_for_two_hundred_million_tensors_is_answered_at_once(single: Path) -> None:
    edit(single / "config.json", lambda config: config.update(n_routed_experts=65536, num_hidden_layers=1024))
    refused(single, "has shape|is missing")


def test_file_that_shrinks_while_it_is_read(single: Path) -> None:
    found = open_checkpoint(single)
    os.truncate(single / "model.safetensors", (single / "model.safetensors").stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ended while"):
        load_checkpoint(found)


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[2]
    gone.unlink()
    refused(sharded, f"lacks 1 of .* shards: {gone.name}")


def test_index_names_a_tensor_no_shard_has(sharded: Path) -> None:
    edit(sharded / INDEX, lambda i: i["weight_map"].update({"more.weight": i["weight_map"]["lm_head.weight"]}))
    refused(sharded, "lacks tensor 'more.weight'")


def test_shard_holds_a_tensor_the_index_has_not(sharded: Path) -> None:
    edit(sharded / INDEX, lambda index: index["weight_map"].pop(EXPERT))
    refused(sharded, f"{EXPERT}.*the index says None")


def test_index_points_to_another_shard(sharded: Path) -> None:
    edit(sharded / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "model-00001-of-00009.safetensors"}))
    (sharded / "model-00001-of-00009.safetensors").write_bytes(sorted(sharded.glob("*.safetensors"))[0].read_bytes())
    refused(sharded, "two shards|but the index says")


def test_tensor_in_two_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(shards[0])
    save_file({**load_file(shards[1]), **tensors}, shards[1])
    refused(sharded, "two shards|but the index says")


def test_index_beside_an_unlisted_single_file(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    refused(sharded, "both")


@pytest.mark.parametrize("value", [{}, [], "x", None])
def test_weight_map_of_another_kind(sharded: Path, value: object) -> None:
    edit(sharded / INDEX, lambda index: index.update(weight_map=value))
    refused(sharded, "no weight_map")


def test_index_lists_pickle(sharded: Path) -> None:
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "pytorch_model.bin"}))
    refused(sharded, r"pytorch_model\.bin.*only \.safetensors")


# Row 34 and folders that are no checkpoint


def test_only_pickle(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, r"only as pickle \(pytorch_model\.bin\).*save_pretrained")


def test_no_weights_and_no_config(single: Path) -> None:
    (single / "model.safetensors").rename(single / "model-00001-of-00002.safetensors")
    refused(single, "but no index")
    (single / "config.json").unlink()
    refused(single, "no config.json")


def test_hub_id_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing is downloaded.*hf download deepseek-ai/deepseek-moe-16b-base"):
        open_checkpoint("deepseek-ai/deepseek-moe-16b-base")
    for name in ("nowhere", "a/b/c", "x\0y", "https://huggingface.co/a/b"):
        with pytest.raises(CheckpointError):
            open_checkpoint(name)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint("file")
