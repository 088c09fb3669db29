"""The tables of the README come from the result files, whatever is written in those."""

import json
from pathlib import Path

import pytest

from benchmarks import report
from tests.compiler.example_comparison import example

DECODE = {
    "benchmark": "decode",
    "preset": "a|b<script>",
    "context": 64,
    "steps": 32,
    "environment": {"cpu": "AMD EPYC", "threads": "2", "command": "python -m benchmarks.decode"},
    "results": [
        {"dtype": "float32", "candidate": "eager", "tokens_per_second": 50.0, "speedup": 1.0}
        | {"mean": 0.02, "sd": 0.001, "median": 0.02, "unstable": True},
        {"dtype": "float32", "candidate": "dsmoe", "agrees": False},
    ],
}


def test_each_kind_of_result_becomes_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(DECODE))
    (tmp_path / "b.json").write_text(json.dumps(example().to_dict()))
    text = report.tables(tmp_path)
    assert "| float32 | eager | 50 | 20 ± 1 | 1.00x | unstable |" in text
    assert "| float32 | dsmoe | disagrees |" in text
    assert "| dsmoe | decode |" in text
    assert "`python -m benchmarks.decode`" in text


def test_the_results_of_this_repository_render() -> None:
    if not list(report.RESULTS.glob("*.json")):
        pytest.skip("no results are committed")
    assert "| tokens |" in report.tables()


def test_an_unknown_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"what": 1}')
    with pytest.raises(ValueError, match=r"odd.json is no result .* its keys are what"):
        report.tables(tmp_path)


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.into(text, "new")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.into(once, "new") == once
    with pytest.raises(ValueError, match="once each"):
        report.into("no marks", "new")
