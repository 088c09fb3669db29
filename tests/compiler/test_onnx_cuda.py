"""Profiles for a GPU, proved on it: our kernels by the library beside the model, and ONNX Runtime's own operator."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_runtime.errors import ArtifactError

pytest.importorskip("onnxscript")
pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from tests.compiler.onnx_examples import exported, gate_model  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("profile", ["ort-cuda", "ort-contrib"])
def test_proved_on_the_gpu_and_generating(profile: str, dtype: torch.dtype, tmp_path: Path) -> None:
    artifact = exported(gate_model("v3", dtype), profile=profile, target="cuda")
    runner: Any = dsmoe.load(artifact.save(tmp_path / "out"))
    node = {"ort-cuda": "DsMoELayer", "ort-contrib": "MoE"}[profile]
    assert runner.manifest["onnx"]["nodes"] == {"layers.1.mlp": f"layers.1.mlp/{node}"}
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    together = runner.generate(ids, max_new_tokens=12)
    assert together.shape == (2, 21)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = runner.generate(ids, max_new_tokens=12)
    if profile == "ort-cuda":  # com.microsoft.MoE's bits differ from run to run
        assert torch.equal(again, together)


def test_without_the_body_only_the_library_runs_it(tmp_path: Path) -> None:
    artifact = exported(gate_model("v1", torch.float16), profile="ort-cuda", functions=False)
    assert artifact.manifest["onnx"]["functions"] == []
    (artifact.folder / "libdsmoe_ort.so").unlink()
    with pytest.raises(ArtifactError, match="DsMoELayer"):
        artifact.runner()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_single_sequence_is_continued_by_decode_onnx(dtype: torch.dtype, tmp_path: Path) -> None:
    """Proved, the same tokens from several threads, and up to the last slot."""
    artifact = exported(gate_model("v3", dtype), profile="ort-cuda", target="cuda", max_seq_len=48)
    assert artifact.manifest["onnx"]["decode"] == "decode.onnx"
    assert any("decode.onnx" in check["name"] for check in artifact.manifest["verification"]["checks"])
    runner: Any = dsmoe.load(artifact.save(tmp_path / "out"))
    prompts = [torch.randint(97, (1, n), generator=torch.Generator().manual_seed(n)).cuda() for n in (1, 5, 9, 30)]
    alone = [runner.generate(ids, max_new_tokens=18) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: runner.generate(ids, max_new_tokens=18), prompts))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    runner.one_token, one = None, runner.one_token
    grown = runner.generate(prompts[2], max_new_tokens=18)
    assert torch.equal(grown[:, :12], alone[2][:, :12])
    assert one.cache[0].shape[2] == 48


def test_a_sequence_begun_while_another_goes_on_does_not_wait_for_it(tmp_path: Path) -> None:
    """By `on_token`, in the same thread: it waited for itself for ever."""
    artifact = exported(gate_model("v1", torch.float32), profile="ort-cuda", target="cuda", max_seq_len=48)
    runner: Any = dsmoe.load(artifact.save(tmp_path / "out"))
    ids = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(1)).cuda()
    alone = runner.generate(ids, max_new_tokens=6)
    inner: list[torch.Tensor] = []
    outer: list[torch.Tensor] = []

    def nested() -> None:
        def begin(_: torch.Tensor) -> None:
            inner.append(runner.generate(ids, max_new_tokens=4))

        outer.append(runner.generate(ids, max_new_tokens=6, on_token=begin))

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert torch.equal(outer[0], alone)
    assert len(inner) == 6
    assert all(torch.equal(tokens, alone[:, :13]) for tokens in inner)
    assert torch.equal(runner.generate(ids, max_new_tokens=6), alone)


def test_a_step_waits_for_what_makes_its_inputs(tmp_path: Path) -> None:
    """Ids that the GPU is still to write: a session in a stream of its own would read what lay there before."""
    runner: Any = exported(gate_model("v1", torch.bfloat16), profile="ort-cuda", target="cuda", max_seq_len=48).runner()
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    past = [torch.empty(2, *shape[1:2], 0, *shape[3:], dtype=runner.dtype).cuda() for p in runner.shapes for shape in p]
    expected = runner.session(ids, past)[0]
    first = runner.one_token(ids[:1, :1], 0)[0]
    for _ in range(5):
        late, one = torch.zeros_like(ids), torch.zeros_like(ids[:1, :1])
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        late.copy_(ids)
        assert torch.equal(runner.session(late, past)[0], expected)
        torch.cuda._sleep(100_000_000)
        one.copy_(ids[:1, :1])
        assert torch.equal(runner.one_token(one, 0)[0], first)


def test_both_files_share_their_weights(tmp_path: Path) -> None:
    """Once in the GPU's memory, although two sessions have them."""
    artifact = exported(gate_model("v1", torch.bfloat16), profile="ort-cuda", target="cuda", max_seq_len=48)
    runner: Any = dsmoe.load(artifact.save(tmp_path / "out"))
    step, one = runner.weights.of("model.onnx"), runner.weights.of("decode.onnx")
    shared = [name for name in one if name in step]
    assert shared
    assert all(one[name].data_ptr() == step[name].data_ptr() for name in shared)


def test_a_damaged_decode_onnx_is_refused(tmp_path: Path) -> None:
    folder = exported(gate_model("v1", torch.bfloat16), profile="ort-cuda", max_seq_len=48).save(tmp_path / "out")
    (folder / "decode.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"decode\.onnx"):
        dsmoe.load(folder)
