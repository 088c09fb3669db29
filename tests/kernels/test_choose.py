"""The cost model against what was measured, plans that fit every shape and GPU, and tables of tuned plans."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsmoe_runtime.kernels import choose, tuned
from dsmoe_runtime.kernels.cost import power, predict, predict_down, predict_up, refusal
from dsmoe_runtime.kernels.gpu import from_properties, named
from dsmoe_runtime.kernels.plan import Plan, Shape, Tile
from dsmoe_runtime.kernels.tuned import Entry

H200 = named("H200")
SHAPE_16B = Shape(64, 2048, 1408, 64, 6, "bfloat16")
PLAN = Plan("sorted", Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4))
SIZES = ((2048, 1408, 64, 6), (1280, 853, 63, 7), (7168, 2048, 256, 8), (64, 32, 8, 2), (7, 5, 3, 3), (40, 6000, 1, 1))


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Neither the user's tables nor the package's: a folder for each, empty."""
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    (tmp_path / "packaged").mkdir()
    choose.forget()
    yield tmp_path
    choose.forget()


@pytest.mark.parametrize("gpu", ["H200", "B200", "A100", "L4", "RTX 3090"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_shape_has_plans_that_fit_every_gpu(gpu: str, dtype: str, sizes: tuple[int, ...]) -> None:
    device = named(gpu)
    for tokens in (1, 2, 17, 300, 20000):
        shape = Shape(tokens, *sizes, dtype)
        found = choose.candidates(shape, device)
        times = [predict(shape, plan, device) for plan in found]
        assert times == sorted(times)
        assert times[0] > 0
        for plan in [*found, *choose.variations(shape, found[0], device)]:
            assert refusal(shape, plan, device) is None
            assert plan.up.block_k <= power(shape.hidden)
            assert plan.down.block_k <= power(shape.width)
            if plan.regime == "pairs" and plan.down.num_stages:
                assert plan.down.block_k >= shape.width


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    wide = Tile(128, 256, 64, 8, 4)
    assert "accumulators" in str(refusal(SHAPE_16B, Plan("sorted", wide, wide), H200))
    deep = Plan("sorted", Tile(128, 128, 64, 8, 5), wide)
    assert "shared memory" in str(refusal(SHAPE_16B, deep, H200))
    tiles = Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 3)
    assert "1024 slots" in str(refusal(replace(SHAPE_16B, tokens=171), Plan("scan", *tiles), H200))
    assert refusal(replace(SHAPE_16B, tokens=170), Plan("scan", *tiles), H200) is None
    assert "half of 16" in str(refusal(SHAPE_16B, Plan("sorted", *tiles, half=True), H200))
    assert "shared memory" in str(refusal(SHAPE_16B, PLAN, replace(H200, shared_memory=64 * 1024)))


@pytest.mark.parametrize(
    ("tokens", "kernel", "tile", "microseconds"),
    [
        (64, "up", (16, 64, 128, 4, 4), 171.0),
        (64, "down", (64, 64, 128, 4, 4), 110.8),  # too little asked for ahead
        (512, "up", (16, 64, 128, 4, 4), 309.3),  # too few rows
        (512, "up", (64, 64, 64, 4, 4), 188.0),
        (4096, "up", (128, 128, 64, 8, 4), 510.3),
        (16384, "down", (128, 256, 64, 8, 4), 881.2),
        (16384, "down", (64, 256, 64, 4, 3), 1142.7),
    ],
)
def test_single_kernels_of_16b_are_predicted_within_15_percent(
    tokens: int, kernel: str, tile: tuple[int, ...], microseconds: float
) -> None:
    """Measured on an H200 by graphs that rotate routings, triton 3.6."""
    time = predict_up if kernel == "up" else predict_down
    plan = Plan("sorted", Tile(*tile), Tile(*tile))
    assert time(replace(SHAPE_16B, tokens=tokens), plan, H200) == pytest.approx(microseconds, rel=0.15)


def test_the_choice_follows_the_regimes() -> None:
    plans = {t: choose.choose(replace(SHAPE_16B, tokens=t), H200) for t in (1, 16, 64, 512, 4096, 16384)}
    assert [plan.regime for plan in plans.values()] == ["pairs", "scan", "sorted", "sorted", "sorted", "sorted"]
    assert [plan.up.block_m for plan in plans.values()] == [1, 16, 16, 64, 128, 128]
    assert plans[16384].up == Tile(128, 128, 64, 8, 4)
    assert plans[16384].down == Tile(128, 256, 64, 8, 4)


def test_buckets_are_few_and_hold_what_falls_into_them() -> None:
    assert [choose.bucket(t) for t in (0, 1, 2, 3, 4, 5, 7, 13, 16, 17, 25, 97, 4096)] == [
        1, 1, 2, 3, 4, 6, 8, 16, 16, 24, 32, 128, 4096
    ]  # fmt: skip
    assert all(t <= choose.bucket(t) <= 1.5 * t for t in range(1, 3000))
    assert len({choose.bucket(t) for t in range(1, 16385)}) == 28
    assert choose.choose(replace(SHAPE_16B, tokens=385), H200) is choose.choose(replace(SHAPE_16B, tokens=512), H200)


def test_a_call_s_sizes_are_enough_to_ask_by() -> None:
    sizes = (300, 2048, 1408, 64, 6)
    assert choose.shape_of(*sizes, torch.bfloat16) == Shape(384, *sizes[1:], "bfloat16")


def write(path: Path, *entries: Entry, **head: object) -> None:
    tuned.store(entries, H200, path)
    if head:
        path.write_text(json.dumps(json.loads(path.read_text()) | head))
    choose.forget()


def test_a_tuned_plan_comes_first_and_the_user_s_before_the_package_s(no_tables: Path) -> None:
    other = replace(PLAN, group=16)
    write(no_tables / "packaged" / "h200.json", Entry(SHAPE_16B, PLAN, 1, 2))
    assert choose.choose(SHAPE_16B, H200) == PLAN
    assert choose.choose(replace(SHAPE_16B, dtype="float16"), H200) == PLAN
    assert choose.choose(replace(SHAPE_16B, dtype="float32"), H200) != PLAN
    assert choose.choose(replace(SHAPE_16B, hidden=4096), H200) != PLAN
    write(tuned.user_table(H200, "bfloat16"), Entry(SHAPE_16B, other, 1, 2))
    assert tuned.user_table(H200, "bfloat16").parent == no_tables / "cache" / "tuned"
    assert choose.choose(SHAPE_16B, H200) == other
    assert choose.choose(SHAPE_16B, named("H100")) != other


def test_a_layer_s_own_plan_comes_before_that_of_its_routed_experts(no_tables: Path) -> None:
    layer, other = replace(SHAPE_16B, shared=2), replace(PLAN, group=16)
    path = no_tables / "packaged" / "h200.json"
    write(path, Entry(SHAPE_16B, PLAN, 1, 2))
    assert choose.choose(layer, H200) == PLAN
    write(path, Entry(layer, other, 1, 2))
    assert [choose.choose(shape, H200) for shape in (layer, SHAPE_16B)] == [other, PLAN]
    assert {entry.shape for entry in tuned.read(path)[1]} == {layer, SHAPE_16B}
    assert choose.choose(replace(layer, shared=1), H200) == PLAN


def test_a_plan_of_other_tokens_is_taken_if_the_model_likes_it_nearly_as_well(no_tables: Path) -> None:
    good = replace(choose.choose(replace(SHAPE_16B, tokens=3072), H200), group=4)
    write(no_tables / "packaged" / "h200.json", Entry(replace(SHAPE_16B, tokens=3072), good, 1, 2))
    assert choose.choose(replace(SHAPE_16B, tokens=4096), H200) == good
    assert choose.choose(replace(SHAPE_16B, tokens=64), H200).up.block_m == 16


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"),
        ("[]", "its format is None"),
        ('{"format": 99}', "its format is 99"),
        ('{"format": 1, "plans": [{"tokens": 1}]}', "incomplete"),
        ('{"format": 1, "plans": {}}', "is no list"),
    ],
)
def test_a_spoilt_file_is_named_and_ignored(
    text: str, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = choose.choose(SHAPE_16B, H200)
    path = tuned.user_table(H200, "bfloat16")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    choose.forget()
    logger = logging.getLogger("dsmoe_runtime")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("WARNING"):
        assert choose.choose(SHAPE_16B, H200) == expected
    assert caplog.messages
    assert all(str(path) in message and reason in message for message in caplog.messages)


@pytest.mark.parametrize(
    "change",
    [
        {"regime": 3}, {"up": [64, 64]}, {"up": "wide"}, {"half": "yes"}, {"colour": "red"}, {"tokens": 0},
        {"tokens": 1.5}, {"us": "fast"},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_that_is_not_understood_spoils_its_file(change: dict[str, object], no_tables: Path) -> None:
    path = no_tables / "t.json"
    write(path, Entry(SHAPE_16B, PLAN, 1, 2))
    table = json.loads(path.read_text())
    table["plans"][0] |= change
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"plan 0|fast"):
        tuned.read(path)


@pytest.mark.parametrize("head", [{"triton": "1.0"}, {"gpu": "NVIDIA H100"}, {"multiprocessors": 66}], ids=str)
def test_a_table_made_elsewhere_does_not_count_and_is_no_fault(
    head: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    expected = choose.choose(SHAPE_16B, H200)
    write(tuned.user_table(H200, "bfloat16"), Entry(SHAPE_16B, replace(PLAN, group=32), 1, 2), **head)
    assert choose.choose(SHAPE_16B, H200) == expected
    assert not caplog.messages


def test_a_tuned_plan_that_cannot_run_is_not_chosen() -> None:
    wide = Tile(128, 256, 64, 8, 4)
    write(tuned.user_table(H200, "bfloat16"), Entry(SHAPE_16B, Plan("sorted", wide, wide), 1, 2))
    assert choose.choose(SHAPE_16B, H200).up.block_m == 16


def test_writing_keeps_other_shapes_and_leaves_nothing_half_done(
    no_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = no_tables / "t.json"
    write(path, Entry(SHAPE_16B, PLAN, 10.123, 20))
    write(path, Entry(replace(SHAPE_16B, tokens=1), PLAN, 1, 2), Entry(SHAPE_16B, replace(PLAN, half=True), 9, 20))
    head, entries = tuned.read(path)
    assert head["gpu"] == "NVIDIA H200"
    assert [(e.shape.tokens, e.plan.half, e.us) for e in entries] == [(1, False, 1.0), (64, True, 9.0)]

    def broken(*_: object) -> None:
        raise OSError("disk full")

    before = path.read_text()
    monkeypatch.setattr(tuned.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        tuned.store([Entry(SHAPE_16B, PLAN, 1, 2)], H200, path)
    assert path.read_text() == before
    assert [p.name for p in no_tables.iterdir() if p.is_file()] == ["t.json"]


def test_the_packaged_tables_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for path in tuned.PACKAGED.glob("*.json"):
        head, entries = tuned.read(path)
        device = named(head["gpu"].removeprefix("NVIDIA "))
        for entry in entries:
            assert refusal(entry.shape, entry.plan, device) is None, f"{path.name}: {entry.shape}"
            assert entry.us < entry.default_us


def properties(name: str, major: int, minor: int, count: int, **more: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=count, **more)


def test_facts_come_from_the_name_else_from_the_properties() -> None:
    whole = from_properties(properties("NVIDIA H200", 9, 0, 132))
    assert (whole.bandwidth, whole.matrix_rate) == (H200.bandwidth, H200.matrix_rate)
    part = from_properties(properties("NVIDIA H200 MIG 1g.18gb", 9, 0, 16))
    assert part.bandwidth == pytest.approx(H200.bandwidth * 16 / 132)
    unknown = from_properties(
        properties(
            "NVIDIA Something", 8, 9, 100, clock_rate=2_000_000, memory_clock_rate=10_000_000, memory_bus_width=256
        )
    )
    assert unknown.bandwidth == pytest.approx(0.945 * 640e9)
    assert unknown.matrix_rate == pytest.approx(0.8 * 2 * 512 * 100 * 2e9)
    assert unknown.shared_memory == 99 * 1024
    assert choose.candidates(SHAPE_16B, from_properties(properties("NVIDIA Future", 13, 1, 200)))
    with pytest.raises(ValueError, match="H200"):
        named("Voodoo 2")
