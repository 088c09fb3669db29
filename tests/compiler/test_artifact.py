"""The artifact folder: there whole or not at all, and refused by name when anything about it is wrong."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dsmoe_compiler.artifact import Artifact, assemble, load
from dsmoe_compiler.artifact_files import describe, listed
from dsmoe_compiler.staging import Stage
from dsmoe_compiler.targets.aoti import PhaseReport
from dsmoe_compiler.version import __version__
from dsmoe_model.checkpoint import byte_tokenizer
from dsmoe_model.checkpoint.shards import write_shard
from dsmoe_model.config import ModelConfig
from dsmoe_runtime.errors import ArtifactError

CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=16,
    max_position_embeddings=32,
)


def filled(stage: Stage) -> dict[str, PhaseReport]:
    """What a target leaves in a stage, but for the native code, which no test of this file loads."""
    reports = {}
    for phase in ("prefill", "decode"):
        with zipfile.ZipFile(stage.path / f"{phase}.pt2", "w") as archive:
            archive.writestr(f"{phase}/data/aotinductor/model/x.so", "not code")
        reports[phase] = PhaseReport(f"{phase}.pt2", 1.0, 1, 1, 1, {}, {"w": "w"})
    (stage.path / "weights").mkdir()
    write_shard(stage.path / "weights" / "model-00001-of-00001.safetensors", [("w", torch.arange(4.0))])
    return reports


def made(near: Path | None = None) -> Artifact:
    stage = Stage(near)
    return assemble(
        stage,
        filled(stage),
        config=CONFIG.to_dict() | {"model_type": "deepseek"},
        tokenizer=byte_tokenizer(),
        target="cpu",
        dtype="float32",
        batch_size=1,
        capacity=32,
        source="preset x",
        facts={"layers": []},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "out").save(tmp_path / "out")


def edit(folder: Path, **changes: object) -> None:
    """Rewrite entries of the manifest, as somebody with an editor would."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_is_listed_with_its_hash(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(files) == there
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    fields = json.loads((folder / "config.json").read_text())
    assert fields.pop("model_type") == "deepseek"
    assert ModelConfig.from_dict(fields) == CONFIG
    assert [p.name for p in folder.parent.iterdir()] == ["out"], "nothing is left beside it"


def test_saving_again_replaces_an_artifact_and_copies_the_published_one(tmp_path: Path) -> None:
    artifact = made()
    first = artifact.save(tmp_path / "one")
    second = artifact.save(tmp_path / "two")
    (second / "stale").write_text("from before")
    made().save(second)
    assert not (second / "stale").exists()
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    artifact = made()
    with pytest.raises(ArtifactError, match="thesis holds files and is no artifact"):
        artifact.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    with pytest.raises(ArtifactError, match="is a link to"):
        artifact.save(tmp_path / "link")
    artifact.save(tmp_path / "free")  # a refusal does not spend the artifact


def test_a_dropped_artifact_leaves_no_folder() -> None:
    artifact = made()
    path = artifact.folder
    assert path.exists()
    del artifact
    assert not path.exists()


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_artifact import made
artifact = made(Path(sys.argv[2]))
from dsmoe_compiler import artifact as artifacts
def wait(*_, **__): print("saving", flush=True); time.sleep(60)
artifacts.Stage.publish = wait
artifact.save(Path(sys.argv[2]))
"""


def test_killed_while_saving_nothing_loads_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saving\n"
        during = made(tmp_path / "other")  # another process at work: its stage is left alone
        assert len(list(tmp_path.iterdir())) == 2
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ArtifactError, match="not an artifact: there is no such folder"):
        load(tmp_path / "out")
    during.save(tmp_path / "other")
    made(tmp_path / "out").save(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_killed_between_the_two_renames_the_old_artifact_comes_back(folder: Path) -> None:
    folder.rename(folder.with_name(".out.dsmoe-old-1234abcd"))
    Stage(folder).discard()
    assert (folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "format is 'other', not 'dsmoe-artifact'"),
        ({"format_version": 7}, rf"\(format 7\); this is {__version__} \(format 1\): upgrade"),
        ({"format_version": "x"}, r"\(format x\)"),
        ({"tool_version": "99.1.0"}, rf"dsmoe-compiler 99\.1\.0 .* this is {__version__}"),
        ({"torch_version": "2.5.1+cu124"}, r"torch 2\.5\.1, this is .*Install torch==2\.5\.1, or compile"),
        ({"batch_size": "1"}, "batch_size in manifest.json is not a int"),
        ({"files": []}, "files in manifest.json is not a dict"),
        ({"target": "tpu"}, "compiled for tpu"),
        ({"processor": {"machine": "pdp11", "level": "x", "features": []}}, "compiled for pdp11, this machine is"),
        (
            {"processor": {"machine": "x86_64", "level": "x86-64-v9", "features": ["avx4096"]}},
            "x86-64-v9 and uses avx4096, which this CPU lacks",
        ),
        ({"phases": {}}, "its phases are"),
        ({"phases": {"prefill": {}}}, "phase 'prefill' lacks 'constants'"),
        ({"dtype": "object"}, "dtype is 'object'"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, changes: dict, said: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=said):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "weights/../../secret", "a\\b", "", ".", "x\0y", ".hidden"]
)
def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(folder, files=manifest["files"] | {name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(ArtifactError, match="only plain names inside the folder"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "prefill.pt2", "weights/model-00001-of-00001.safetensors", "weights"])
def test_links_are_refused(folder: Path, name: str) -> None:
    path, outside = folder / name, folder.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match="is a link"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "prefill.pt2", "decode.pt2", "weights/model-00001-of-00001.safetensors"]
)
def test_every_file_is_checked_to_the_bit(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{path.name} has not the hash"):
        load(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"{path.name} has {len(data) - 1:,} bytes, its manifest says {len(data)}"):
        load(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{path.name} is missing"):
        load(folder)


def test_a_file_that_nobody_listed_is_refused(folder: Path) -> None:
    write_shard(folder / "weights" / "more.safetensors", [("v", torch.zeros(1))])
    with pytest.raises(ArtifactError, match=r"weights/more\.safetensors, which its manifest does not list"):
        load(folder)


def test_the_hashes_of_weights_alone_can_be_skipped(folder: Path) -> None:
    path = folder / "weights" / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"prefill\.pt2 cannot be loaded"):  # it got as far as the stand-in code
        load(folder, check_weights=False)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json has 2 bytes"):
        load(folder, check_weights=False)


def test_a_package_with_a_pickle_in_it_is_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / "prefill.pt2", "a") as archive:
        archive.writestr("prefill/data/weights/model.pt", "cos\nsystem\n")
    edit(folder, files={name: describe(folder / name) for name in listed(folder)})
    with pytest.raises(ArtifactError, match=r"holds 'prefill/data/weights/model\.pt', which no package of ours does"):
        load(folder)


def test_what_is_no_folder_or_no_artifact_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load(tmp_path)
