"""An altered ONNX artifact is refused by name before ONNX Runtime opens it; what cannot run, before it is written."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_compiler.artifact_files import describe, listed
from dsmoe_compiler.cli import main
from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.targets.onnx import compiling
from dsmoe_compiler.targets.onnx.session import StepSession
from dsmoe_compiler.targets.onnx.weights_once import Weights
from dsmoe_model.checkpoint.shards import read_header
from dsmoe_runtime.agreement import row_error
from dsmoe_runtime.errors import ArtifactError, ConfigError, TargetError, VerificationError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("onnx")
import onnx
import onnxruntime

from tests.compiler.onnx_examples import exported, gate_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(gate_model("v1"), verify=False).save(tmp_path_factory.mktemp("onnx") / "out")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_the_library_runs_the_experts_of_a_whole_model(made: Path) -> None:
    """Other sums than the body's, so logits differ by rounding, and the experts chosen and the tokens do not."""
    ids = torch.randint(0, 16, (3, 9), generator=torch.Generator().manual_seed(0))
    body, library = dsmoe.load(made), dsmoe.load(made, library=True)
    first, second = (runner.prefill(ids, runner.new_cache()) for runner in (body, library))
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    assert row_error(second[0], first[0].double()).max() < 64 * torch.finfo(torch.float32).eps
    assert torch.equal(*(runner.generate(ids, max_new_tokens=8) for runner in (body, library)))


def test_weights_that_are_handed_over_are_taken_as_they_lie(made: Path) -> None:
    """Read from the files, they give the same bits; altered where they lie, they give others."""
    cpu = torch.device("cpu")
    weights = Weights(made, cpu)
    if not weights.shared:
        pytest.skip(f"onnxruntime {onnxruntime.__version__} takes no tensor as a weight")
    values, again = weights.of("model.onnx"), weights.of("model.onnx")
    assert len(values) > 10
    assert all(values[name].data_ptr() == again[name].data_ptr() for name in values)
    own, handed = StepSession(made / "model.onnx", cpu), StepSession(made / "model.onnx", cpu, weights=values)
    past = [torch.zeros(1, *shape[1:2], 0, *shape[3:]) for _, shape in (own.inputs[name] for name in own.past)]
    ids = torch.arange(7)[None]
    assert torch.equal(own(ids, past)[0], handed(ids, past)[0])
    torch.from_dlpack(values["model.embed_tokens.weight"]).mul_(2.0)
    assert not torch.equal(own(ids, past)[0], handed(ids, past)[0])


def test_an_onnxruntime_that_cannot_share_weights_is_told_of(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dsmoe_compiler"), "propagate", True)
    monkeypatch.delattr(onnxruntime.OrtValue, "from_dlpack", raising=False)
    with caplog.at_level("WARNING"):
        weights = Weights(made, torch.device("cpu"))
        assert weights.of("model.onnx") == {}
    assert f"onnxruntime {onnxruntime.__version__} cannot hand weights to two sessions" in caplog.text
    assert "onnxruntime 1.26 can" in caplog.text


def test_explain_names_the_node_of_each_layer(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = json.loads((made / "manifest.json").read_text())["onnx"]["nodes"]
    assert main(["explain", str(made), "--strict"]) == 0
    said = capsys.readouterr().out
    assert nodes
    assert all(layer in said and f"node {node}" in said for layer, node in nodes.items())
    assert main(["explain", str(made), "--stage", "all"]) == 2


def test_explain_says_that_a_manifest_is_damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": [{"nome": "layers.0"}]}))
    assert main(["explain", str(folder)]) == 1
    assert "tells no layers" in capsys.readouterr().err


def seal(folder: Path) -> None:
    """What somebody does who also knows about the hashes."""
    path = folder / "manifest.json"
    files = {name: describe(folder / name) for name in listed(folder)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    seal(folder)


def refer(key: str, value: str) -> Callable[[Any], None]:
    """Change where the first weight says that it lies."""

    def change(proto: Any) -> None:
        tensor = next(t for t in proto.graph.initializer if t.data_location)
        kept = [e for e in tensor.external_data if e.key != key]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
        tensor.external_data.add(key=key, value=value)

    return change


def experts_node(proto: Any) -> Any:
    return next(node for node in proto.graph.node if node.op_type == "DsMoE")


def unknown_attribute(proto: Any) -> None:
    experts_node(proto).attribute.append(onnx.helper.make_attribute("clamp", 7.0))


def other_activation(proto: Any) -> None:
    for attribute in experts_node(proto).attribute:
        if attribute.name == "activation":
            attribute.s = b"selu"


def other_opset(proto: Any) -> None:
    next(entry for entry in proto.opset_import if entry.domain == "").version = 17


def foreign_opset(proto: Any) -> None:
    proto.opset_import.add(domain="evil.corp", version=1)


def other_version(proto: Any) -> None:
    next(entry for entry in proto.opset_import if entry.domain == "dsmoe").version = 2


def newer_runtime(proto: Any) -> None:
    next(e for e in proto.metadata_props if e.key == "dsmoe.minimum_onnxruntime").value = "99.0"


def no_minimum(proto: Any) -> None:
    del proto.metadata_props[:]


def constant_from_outside(proto: Any) -> None:
    tensor = onnx.TensorProto(name="c", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def other_input(proto: Any) -> None:
    name = proto.graph.input[1].name
    proto.graph.input[1].name = "keys"
    for node in proto.graph.node:
        node.input[:] = ["keys" if given == name else given for given in node.input]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (refer("location", "../secret"), r"lies in '\.\./secret': only files in weights/ are accepted"),
        (refer("location", "/etc/passwd"), "lies in '/etc/passwd': only files in weights/"),
        (refer("location", "weights/../config.json"), r"lies in 'weights/\.\./config\.json': only"),
        (refer("location", "weights/none.safetensors"), "which is a link or missing"),
        (refer("offset", "99999999"), r"it names [\d,]+ from 99,999,999 on"),
        (refer("offset", "-4"), "it names .* from -4 on"),
        (refer("length", "8"), "takes .* bytes; it names 8 from"),
        (refer("offset", "x"), "has no offset and length"),
        (constant_from_outside, "a constant of Constant 'c' lies in '/etc/passwd'"),
        (unknown_attribute, "'clamp' is unknown"),
        (other_activation, "activation is 'selu'"),
        (other_opset, "imports opset '' in version 17, not version 23"),
        (foreign_opset, r"imports opset 'evil\.corp' in version 1, not one of"),
        (other_version, "imports opset 'dsmoe' in version 2, not version 1"),
        (newer_runtime, r'needs ONNX Runtime 99\.0 or newer, this is .*pip install "onnxruntime>=99\.0"'),
        (no_minimum, "says no minimum version of ONNX Runtime"),
        (other_input, r"takes other inputs than its manifest says: \['past_key_values\.0\.key', 'keys'\]"),
    ],
)
def test_an_edited_model_is_refused(folder: Path, change: Callable[[Any], None], said: str) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError, match=said):
        dsmoe.load(folder)


def test_what_is_no_protobuf_and_what_is_not_listed(folder: Path) -> None:
    (folder / "libdsmoe_ort.so").write_bytes(b"code")
    with pytest.raises(ArtifactError, match=r"holds libdsmoe_ort\.so, which its manifest does not list"):
        dsmoe.load(folder)
    (folder / "libdsmoe_ort.so").unlink()
    (folder / "model.onnx").write_bytes(b"\x08\xff\xff")
    with pytest.raises(ArtifactError, match=r"model\.onnx has 3 bytes, its manifest says"):
        dsmoe.load(folder)
    seal(folder)
    with pytest.raises(ArtifactError, match=r"model\.onnx is no ONNX model"):
        dsmoe.load(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_model_for_a_gpu_says_that_there_is_none(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"target": "cuda"}))
    with pytest.raises(ArtifactError, match=r"was compiled for cuda; torch .* sees no GPU here"):
        dsmoe.load(folder)
    with pytest.raises(ArtifactError, match="was compiled for cuda; it cannot run on cpu"):
        dsmoe.load(folder, device="cpu")


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "weights" / SHARD).rename(tmp_path / "elsewhere")
    (folder / "weights" / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link"):
        dsmoe.load(folder)


def test_weights_that_hold_nan_are_refused_by_name(folder: Path) -> None:
    path = folder / "weights" / SHARD
    entry = read_header(path)["model.layers.1.mlp.experts.down_proj"]
    data = bytearray(path.read_bytes())
    data[entry.offset : entry.offset + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    seal(folder)
    with pytest.raises(ArtifactError, match=r"the weight 'model\.layers\.1\.mlp\.experts\.down_proj' holds NaN"):
        dsmoe.load(folder)
    assert dsmoe.load(folder, check_weights=False).capacity == 128


def test_an_older_runtime_is_told_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    with pytest.raises(ArtifactError, match=r"needs ONNX Runtime 1\.23 or newer, this is 1\.19\.2"):
        dsmoe.load(folder)


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where unpublished artifacts lie, and nothing else."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_file_that_is_not_the_model_is_not_published(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts answer for each other, in the file alone."""
    move_out = compiling.move_out

    def swap(model: Any, folder: Path, **options: Any) -> None:
        move_out(model, folder, **options)
        path = folder / "weights" / SHARD
        entry = read_header(path)["model.layers.1.mlp.experts.down_proj"]
        size = entry.nbytes // entry.shape[0]
        data = bytearray(path.read_bytes())
        one, other = (slice(entry.offset + e * size, entry.offset + (e + 1) * size) for e in (0, 1))
        data[one], data[other] = data[other], data[one]
        path.write_bytes(data)

    monkeypatch.setattr(compiling, "move_out", swap)
    with pytest.raises(VerificationError, match=r"the first layer that diverges is layers\.1"):
        exported(gate_model("v1"))
    assert list(stages.iterdir()) == []


def test_a_full_disk_leaves_nothing(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmoe_compiler.targets.onnx.external.write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        exported(gate_model("dense"))
    assert list(stages.iterdir()) == []


def test_what_cannot_run_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"multiplies no bfloat16 matrices.*float16 or float32, or target cuda"):
        exported(gate_model("v1", torch.bfloat16))
    broken = gate_model("dense")
    with torch.no_grad():
        broken.layers[1].self_attn.q_proj.weight[3, 3] = torch.nan
    with pytest.raises(TargetError, match=r"the weight 'model\.layers\.1\.self_attn\.q_proj\.weight' holds NaN"):
        exported(broken)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(TargetError, match=r"needs ONNX Runtime's CUDAExecutionProvider.*onnxruntime-gpu"):
        exported(gate_model("v1"), profile="ort-cuda")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"formats": ("aoti", "onnx")}, "an artifact has one format"),
        ({"formats": ("onnx",), "profile": "webgpu"}, "profile is 'webgpu'; it must be one of portable"),
        ({"formats": ("onnx",), "profile": "ort-cuda", "target": "cpu"}, "ort-cuda is for target cuda"),
        ({"formats": ("onnx",), "batch_size": 4}, "any number of rows"),
        ({"formats": ("onnx",), "functions": False}, "left out of profile ort-cuda only"),
        ({"profile": "ort-contrib"}, "belongs to format onnx"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CompileConfig(**options)


def test_options_of_native_code_and_of_onnx_are_told_apart(folder: Path) -> None:
    assert CompileConfig(formats=("onnx",)).target == "cpu"
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["onnx"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="not an ONNX model: library and threads mean nothing"):
        dsmoe.load(folder, library=True)
