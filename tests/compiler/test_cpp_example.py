"""examples/cpp: built with CMake as its README says, it gives the tokens that the Python runner gives."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe_compiler import api
from dsmoe_compiler.artifact import load
from dsmoe_compiler.config import CompileConfig
from dsmoe_model.presets import preset
from dsmoe_model.transformer import build

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")]
EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
PROMPT, NEW = [256, 72, 101], 12
DENSE = replace(
    preset("dense-0.2b"),
    vocab_size=260,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=96,
    max_position_embeddings=48,
    initializer_range=0.125,
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build_folder = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", EXAMPLE, "-B", build_folder, prefix], ["cmake", "--build", build_folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return build_folder / "generate"


def generated(program: Path, folder: Path, ids: list[int]) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(folder), ",".join(map(str, ids)), str(NEW)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_dense_model_runs_without_python(program: Path, tmp_path: Path) -> None:
    """Also on the CPU; ids outside the vocabulary are refused before a package reads beyond its embedding."""
    config = CompileConfig(target="cpu", verify=False)
    folder = api.compile(build(DENSE, seed=1), config=config).save(tmp_path / "dense")
    done = generated(program, folder, PROMPT)
    assert done.returncode == 0, done.stderr
    ids = load(folder).generate(torch.tensor([PROMPT]), max_new_tokens=NEW)[0, len(PROMPT) :]
    assert [int(i) for i in done.stdout.split(",")] == ids.tolist()
    done = generated(program, folder, [72, 260])
    assert (done.returncode, done.stdout) == (1, "")
    assert "token 260 is not in the vocabulary" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_model_with_experts_runs_without_python_on_a_gpu(program: Path, tmp_path: Path) -> None:
    config = CompileConfig(target="cuda", dtype="bfloat16", max_seq_len=64, verify=False)
    folder = api.compile("deepseek-moe-tiny", config=config).save(tmp_path / "tiny")
    done = generated(program, folder, PROMPT)
    assert done.returncode == 0, done.stderr
    ids = load(folder, cuda_graph=False).generate(torch.tensor([PROMPT]).cuda(), max_new_tokens=NEW)[0, len(PROMPT) :]
    assert [int(i) for i in done.stdout.split(",")] == ids.tolist()
