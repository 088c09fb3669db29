"""The command line before any work: help, versions, refusals with exit 2, and no tracebacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_compiler.cli import main
from dsmoe_compiler.cli.main import VERBS
from dsmoe_compiler.version import __version__

TINY = "deepseek-moe-tiny"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must be refused: exit 2, nothing on stdout, nothing written, one line that is returned."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def run(*arguments: str) -> str:
        try:
            code = main(list(arguments))
        except SystemExit as leave:  # argparse's own way
            code = leave.code
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.NAME)
def test_every_verb_explains_itself_with_examples(verb: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main([verb.NAME, "--help"])  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    assert leave.value.code == 0
    assert f"  dsmoe {verb.NAME}" in out.partition("examples:")[2]  # type: ignore[attr-defined]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    assert capsys.readouterr().out == f"dsmoe {__version__}\n"


def test_no_verb_and_an_unknown_verb(refused: Callable[..., str]) -> None:
    assert "VERB" in refused()
    assert "invalid choice: 'compil'" in refused("compil")


@pytest.mark.parametrize("verb", ["info", "explain", "compare", "generate", "compile"])
def test_a_mistyped_preset_brings_the_closest_names_first(verb: str, refused: Callable[..., str]) -> None:
    more = {"generate": ("--prompt", "x"), "compile": ("-o", "out")}.get(verb, ())
    message = refused(verb, "deepseek-moe-tny", *more)
    assert "'deepseek-moe-tny'" in message
    assert message.index("deepseek-moe-tiny") < message.index("llama2-7b")


def test_a_file_is_no_model(refused: Callable[..., str]) -> None:
    assert "is a file" in refused("info", __file__)


@pytest.mark.parametrize("name", ["aoti,onnx", "aoti,mlir"])
def test_an_artifact_has_one_format(name: str, refused: Callable[..., str]) -> None:
    assert "one format" in refused("compile", TINY, "-o", "out", "--format", name)


def test_an_unknown_format_and_none(refused: Callable[..., str]) -> None:
    assert "unknown" in refused("compile", TINY, "-o", "out", "--format", "tflite")
    assert "names no format" in refused("compile", TINY, "-o", "out", "--format", ",")


def test_cuda_without_a_gpu_says_what_is_there(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in (("compile", TINY, "-o", "out"), ("compare", TINY)):
        message = refused(*command, "--target", "cuda")
        assert "finds no GPU" in message
        assert "--target cpu" in message


def test_an_output_that_would_be_overwritten(
    refused: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "thesis.txt").write_text("years of work")
    assert "holds files and is no artifact" in refused("compile", TINY, "-o", str(folder))
    assert "not a folder" in refused("compile", TINY, "-o", str(folder / "thesis.txt"))
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compile", TINY, "-o", "out", "--batch-size", "0"), "0 is below 1"),
        (("compile", TINY, "-o", "out", "--max-seq-len", "many"), "'many' is no whole number"),
        (("compile", TINY), "-o/--output"),
        (("compare", TINY, "--tokens", "1,-2"), "-2 is below 1"),
        (("compare", TINY, "--against", "eager,tvm"), "'tvm'"),
        (("explain", TINY, "--stage", "fuse_everything"), "fuse_moe"),
        (("generate", TINY, "--prompt", "x", "--top-k", "3"), "--temperature"),
        (("generate", TINY, "--prompt", "x", "--temperature", "-1"), "-1 is not 0 or a positive number"),
        (("generate", TINY, "--prompt", "x", "--temperature", "nan"), "nan is not 0 or a positive number"),
        (("generate", TINY, "--prompt", "x", "--temperature", "1", "--top-p", "1.5"), "does not lie in (0, 1]"),
    ],
)
def test_values_out_of_range(arguments: tuple[str, ...], said: str, refused: Callable[..., str]) -> None:
    assert said in refused(*arguments)


def test_a_log_level_that_is_none(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_LOG_LEVEL", "LOUD")
    assert "DSMOE_LOG_LEVEL='LOUD'" in refused("list")


def test_a_refused_checkpoint_exits_1_and_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path has blanks and letters beyond ASCII: it must come back as it was typed."""
    folder = tmp_path / "mein Modell ü 模型"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    assert main(["info", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "mein Modell ü 模型" in err
    assert "Traceback" not in err


def test_tracebacks_on_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{")
    assert main(["info", str(tmp_path), "-vv"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("DSMOE_DEBUG", "1")
    assert main(["info", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_doctor_says_yes_or_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dsmoe"] == __version__
    assert all(ability["ok"] or ability["remedy"] for ability in facts["abilities"])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(ability["name"] in out for ability in facts["abilities"])
