"""`dsmoe compile` and `dsmoe generate`: exit codes, and text in and out of an artifact in a new process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmoe_compiler import api
from dsmoe_compiler.cli import main
from dsmoe_runtime.errors import NotFusedError, VerificationError

TINY = "deepseek-moe-tiny"
PROMPT = "Once upon a time, in Köln"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VerificationError("the compiled model is not the same model; layers.2.mlp diverges first"), 3),
        (NotFusedError("strict: 1 layers were left alone; layers.1.mlp: a hook"), 1),
        (OSError(28, "No space left on device", "out/weights"), 1),
        (RuntimeError("prefill failed"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_what_goes_wrong_has_its_exit_code_and_one_line(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(api, "compile", fail)
    out = tmp_path / "out"
    assert main(["compile", TINY, "-o", str(out)]) == code
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert str(error.args[-1]).split(";")[0] in stderr
    assert "Traceback" not in stderr
    assert not out.exists()


def test_generate_streams_what_the_plain_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", TINY, "--prompt", PROMPT, "--max-new-tokens", "6", "--ignore-eos", "--seed", "3"]
    assert main(command) == 0
    streamed, log = capsys.readouterr()
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert streamed == result["text"] + "\n"
    assert result["tokens"] == 6
    assert result["prompt_tokens"] == 1 + len(PROMPT.encode())
    assert "tokens/s" in log


def test_the_prompt_may_come_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", TINY, "--prompt", "-", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPT


def test_a_prompt_that_does_not_fit_says_both_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", TINY, "--prompt", "x" * 500, "--max-new-tokens", "50"]) == 1
    assert "501" in (error := capsys.readouterr().err)
    assert "512" in error


@pytest.mark.slow
def test_text_in_and_out_of_an_artifact(tmp_path: Path) -> None:
    """The path has a blank and letters beyond ASCII (row 55); every step is a process of its own."""
    out = tmp_path / "mein Modell ü 模型" / "tiny"

    def dsmoe(*arguments: str) -> str:
        command = [sys.executable, "-m", "dsmoe_compiler", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = dsmoe("compile", TINY, "-o", str(out), "--strict", "--max-seq-len", "128")
    assert "verified" in printed
    assert "3 of 3 MoE layers fused" in printed
    asked = ("--prompt", PROMPT, "--max-new-tokens", "24")
    assert dsmoe("generate", str(out), *asked) == dsmoe("generate", TINY, *asked)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]

    (out / "config.json").write_text("{}")
    command = [sys.executable, "-m", "dsmoe_compiler", "generate", str(out), *asked]
    altered = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert altered.returncode == 1
    assert "config.json" in altered.stderr
    assert "Traceback" not in altered.stderr
