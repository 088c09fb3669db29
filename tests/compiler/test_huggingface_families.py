"""The survey of families: its page is the command's, its rows say what is wrong, and no family takes it down."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from dsmoe_compiler.huggingface import families, family_run, versions
from dsmoe_compiler.huggingface.families import COLUMNS, COMMAND, INTRODUCTION, main, render, run_together
from dsmoe_compiler.huggingface.family_models import build
from dsmoe_compiler.huggingface.family_run import Row

ROOT = Path(__file__).parents[2]
FUSED = Row("a", "AModel", 2, 2, 2, 2, "top-2 of softmax", "grouped_mm", 1e-7, 2e-7, True)


def test_the_page_is_what_the_command_writes() -> None:
    """The numbers are the machine's; the frame must be the code's, or somebody edited the page or forgot to make it."""
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert f"Made by `{COMMAND}`: do not edit. transformers 5." in page
    assert INTRODUCTION in page
    assert f"| {' | '.join(COLUMNS)} |" in page
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == len(COLUMNS) - 1]
    known = {family for row in rows for family in [row.split(" | ")[0].removeprefix("| ")]}
    assert {"deepseek_v3", "gpt_oss", "nemotron_h", "muse_spark"} <= known
    assert "| wrong |" not in page


def test_a_row_says_its_state() -> None:
    assert FUSED.state == "fused"
    assert replace(FUSED, gated=1, whole=1).state == "experts only"
    assert replace(FUSED, fused=1, gated=1).state == "partly"
    assert replace(FUSED, fused=0, gated=0).state == "left alone"
    assert replace(FUSED, ok=False).state == "wrong"
    assert Row("a", reason="no such class").state == "not run"
    page = render([FUSED, replace(FUSED, family="b", ok=False), Row("c", reason="x | y")], day=date(2026, 1, 2))
    assert "| a | fused | 2 / 2 (2 in one) | top-2 of softmax | grouped_mm | 1.0e-07 | 2.0e-07 |  |" in page
    assert "Of 3 families 1 fuse completely, 0 their experts only, 0 partly, 0 not at all; 1 are wrong" in page
    assert "| c | not run | 0 / 0 |  |  |  |  | x / y |" in page
    assert "2026-01-02" in page


def test_a_family_that_ends_its_process_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(part: list[str], _seconds: int) -> tuple[dict[str, Row], str]:
        rows = {}
        for family in part:
            if family == "crashes":
                break
            rows[family] = Row(family, "Model")
        return rows, "its process ended with exit code -11: no message"

    monkeypatch.setattr(families, "_run", fake)
    rows = run_together(["good", "crashes", "after"])
    assert [(row.family, row.model) for row in rows] == [("good", "Model"), ("crashes", ""), ("after", "Model")]
    assert "exit code -11" in rows[1].reason


def test_what_cannot_be_built_or_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError):
        build("no_such_family")
    assert family_run.survey("no_such_family").reason.startswith("no tiny model of it could be built")

    def broken(_family: str) -> object:
        raise ValueError("FooModel: TypeError: no")

    monkeypatch.setattr(family_run, "build", broken)
    assert family_run.survey("qwen3_moe").reason == "no tiny model of it could be built: FooModel: TypeError: no"


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "qwen3_mow"])
    assert "'qwen3_mow': transformers has no such family" in capsys.readouterr().err


def test_the_range_of_transformers_is_pyprojects() -> None:
    wanted = f"transformers>={versions.OLDEST},<{versions.NEWEST}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["transformers"] == [wanted]
    assert wanted in extras["test"]


@pytest.mark.slow
def test_a_handful_of_families_fuse_and_are_right() -> None:
    for family in ("deepseek_v3", "qwen3_next", "nemotron_h", "granitemoe", "openai_privacy_filter"):
        row = family_run.survey(family)
        assert row.state == "fused", row
        assert row.seen >= 1
