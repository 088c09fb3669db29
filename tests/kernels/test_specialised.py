"""The warp-specialised kernels without a GPU: their machine code, and who is told that they cannot run."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from dsmoe_runtime.kernels import experts as kernels
from dsmoe_runtime.kernels.choose import candidates, choose, refusal, variations
from dsmoe_runtime.kernels.gpu import named
from dsmoe_runtime.kernels.plan import Plan, Shape, Tile
from tests.kernels.test_sm90 import MOST_STACK, SHARED_MEMORY, build

H200 = named("H200")
SHAPE = Shape(16384, 2048, 1408, 64, 6, "bfloat16")
PLAN = Plan("sorted", Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), half=True, specialised=True)


@pytest.mark.slow
def test_machine_code():
    """Two consumers of the widest products each; weights by the copy engine; in up, rows gathered and fenced."""
    built = build("specialised")
    assert {found["kernel"] for found in built} == {"product_specialised"}
    # Of down in two dtypes and as 16B has it; of up eight copies, and the arrival that they trigger.
    assert sorted(found["LDGSTS"] for found in built) == [0, 0, 0, 9, 9, 9, 9, 9, 9]
    for found in built:
        assert found["stack"] <= MOST_STACK, found
        assert found["LDL"] + found["STL"] <= MOST_STACK // 2, found
        assert found["shared"] <= SHARED_MEMORY, found
        assert found["HGMMA"] == found["HGMMA.64x256x16"] == 8, found  # two warpgroups, a depth of 64 in steps of 16
        assert found["UTMALDG"] == (2 if found["LDGSTS"] else 4), found
        gathers = bool(found["LDGSTS"])
        assert found["ARRIVES.LDGSTSBAR.64.ARVCNT"] == gathers, found  # noinc, as the barrier is counted
        fences = found["FENCE.VIEW.ASYNC"] - 2 * gathers  # one of each consumer, and
        assert fences in (1, 4), found  # of the barriers of all stages together, or of each stage's


def test_plans_that_name_them():
    assert refusal(SHAPE, PLAN, H200) is None
    plain = replace(PLAN, specialised=False)
    assert any(plan.specialised for plan in variations(SHAPE, plain, H200))
    low = replace(PLAN, up=replace(PLAN.up, block_m=64), down=replace(PLAN.down, block_m=64))
    for shape, plan, device, word in (
        (SHAPE, low, H200, "128 rows"),
        (SHAPE, PLAN, named("A100"), "Hopper"),
        (replace(SHAPE, dtype="float32"), PLAN, H200, "16 bits"),
        (replace(SHAPE, width=853), PLAN, H200, "853"),
    ):
        assert word in str(refusal(shape, plan, device))


def test_they_are_chosen_where_an_expert_has_many_rows():
    """Measured: 5 to 10 % ahead at 1024 and 1536 rows an expert; at 256 and 384 from 4 % ahead to 2 % behind."""
    assert choose(SHAPE, H200).specialised
    assert not choose(replace(SHAPE, tokens=4096), H200).specialised
    assert not choose(replace(SHAPE, tokens=65536, dtype="float32"), H200).specialised
    assert sum(plan.specialised for plan in candidates(SHAPE, H200)) == 1


def test_they_are_not_chosen_where_an_expert_is_larger_than_the_cache():
    """Measured on DeepSeek-V3's shape, 512 rows an expert: 27.9 ms in them, 20.8 ms in the others."""
    shape = replace(SHAPE, hidden=7168, width=2048, experts=256, top_k=8)
    assert not choose(shape, H200).specialised
    assert choose(replace(shape, hidden=1280, width=864), H200).specialised


def test_the_log_says_once_why_they_do_not_run(monkeypatch, caplog):
    kernels.tell_once.cache_clear()
    monkeypatch.setattr(kernels, "choose", lambda *_: PLAN)
    w = kernels.Weights.of(torch.empty(4, 32, 16), torch.empty(4, 16, 16), None, None, "silu", 1.0, 1.0, "concat")
    with caplog.at_level(logging.INFO):
        plans = [kernels.plan_for(torch.empty(8, 16), 2, w) for _ in range(2)]
    assert plans == 2 * [replace(PLAN, specialised=False)]
    assert [record.message for record in caplog.records if "specialised" in record.message] == [
        "the plan names specialised kernels, and the plain ones run: "
        "only Hopper has the products of warpgroups that they use"
    ]


def test_what_they_cannot_take(monkeypatch):
    """On a machine that has them; every reason that is left."""
    from dsmoe_runtime.kernels import specialised

    monkeypatch.setattr(specialised, "chained", lambda device: True)
    half, n_experts, width, hidden = torch.bfloat16, 4, 24, 16

    def asked(
        layout: str = "concat", x: torch.Tensor | None = None, bias: bool = False, width: int = width, dtype=half
    ) -> str:
        shapes = [(n_experts, (1 if layout == "ungated" else 2) * width, hidden), (n_experts, hidden, width)]
        made = [torch.empty(s, dtype=dtype) for s in shapes]
        if layout.endswith("_transposed"):
            made = [t.mT.contiguous() for t in made]
        biases = (torch.empty(n_experts, 2 * width), None) if bias else (None, None)
        w = kernels.Weights.of(*made, *biases, "silu", 1.0, 1.0, layout)
        return str(specialised.refusal(torch.empty(8, hidden, dtype=half) if x is None else x, w))

    assert asked() == "None"
    assert asked(x=torch.empty(8, 3 * hidden, dtype=half)[:, :hidden]) == "None"
    assert "interleaved" in asked("interleaved")
    assert "nothing gates" in asked("ungated")
    assert "strides" in asked("concat_transposed")
    assert "biases" in asked(bias=True)
    assert "down has strides" in asked(width=20)
    assert "16 bits" in asked(dtype=torch.float32)
    assert "x has strides" in asked(x=torch.empty(8, hidden + 4, dtype=half)[:, :hidden])
    assert "x has strides" in asked(x=torch.empty(8, 2 * hidden, dtype=half)[:, 4 : 4 + hidden])
