"""The paper's systems on the meta device: parameters and FLOPs as printed, and the cells that arithmetic denies."""

from __future__ import annotations

import time
from math import prod

import pytest
import torch

from dsmoe_model.accounting import PRINTED, account, disagreements, paper_flops, training_flops
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import Transformer, build

ISSUE = [
    "deepseek-moe-2b",
    "gshard-2b",
    "gshard-2.9b",
    "switch-2b",
    "hash-2b",
    "dense-0.2b",
    "dense-x16",
    "deepseek-moe-16b",
    "deepseek-7b",
    "llama2-7b",
    "deepseek-moe-145b",
    "deepseek-moe-142b-half",
    "gshard-137b",
    "deepseek-67b",
    "deepseek-moe-tiny",
]


def test_every_system_is_there_in_order() -> None:
    assert [name for name in PRESETS if name in ISSUE] == ISSUE
    assert list(PRINTED) == list(PRESETS)[:-1]


def test_the_16b_has_exactly_the_published_parameters() -> None:
    counted = account(PRESETS["deepseek-moe-16b"])
    assert counted.total == 16_375_728_128
    assert counted.activated == 2_828_650_496
    assert counted.attention == 28 * 4 * 2048**2
    assert counted.router == 27 * 64 * 2048


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("deepseek-moe-16b", "74.4"),
        ("llama2-7b", "187.9"),
        ("deepseek-7b", "183.5"),
        ("deepseek-67b", "2057.5"),
        ("gshard-137b", "572.7"),
        ("deepseek-moe-145b", "585.3"),  # the paper prints 585.6
        ("deepseek-moe-142b-half", "374.5"),  # the paper prints 374.6
    ],
)
def test_flops_per_4k_tokens(name: str, printed: str) -> None:
    assert f"{paper_flops(PRESETS[name], 4096) / 1e12:.1f}" == printed


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("deepseek-moe-2b", "4.3"),
        ("gshard-2b", "4.3"),
        ("switch-2b", "2.9"),
        ("hash-2b", "2.9"),
        ("dense-0.2b", "2.9"),
        ("gshard-2.9b", "5.8"),
        ("dense-x16", "24.6"),
    ],
)
def test_flops_per_2k_tokens(name: str, printed: str) -> None:
    assert f"{paper_flops(PRESETS[name], 2048) / 1e12:.1f}" == printed


def test_disagreements_are_these_five_and_no_others() -> None:
    found = {name: [line.split(":")[0] for line in disagreements(name, PRESETS[name])] for name in PRESETS}
    assert {name: lines for name, lines in found.items() if lines} == {
        "deepseek-moe-145b": ["FLOPs per 4096 tokens"],
        "deepseek-moe-142b-half": ["total parameters", "activated parameters", "FLOPs per 4096 tokens"],
        "gshard-137b": ["activated parameters"],
    }
    suspect = disagreements("deepseek-moe-142b-half", PRESETS["deepseek-moe-142b-half"])[1]
    assert suspect == "activated parameters: the paper prints 12.2B, arithmetic gives 13.6B (+11.56%)"


def test_widths_as_built_cost_what_a_count_of_products_says() -> None:
    """Two FLOPs a multiply-add, three passes, attention without the causal half."""
    config = PRESETS["deepseek-moe-16b"]
    assert f"{training_flops(config, 4096) / 1e12:.1f}" == "75.8"
    hidden, tokens = 2048, 4096
    linear = 28 * 4 * hidden**2 + 3 * hidden * (10944 + 27 * 8 * 1408) + 102400 * hidden
    scores = 28 * 2 * tokens * tokens * hidden
    assert training_flops(config, tokens) == 3 * 2 * (linear * tokens + scores)


@pytest.mark.parametrize("name", PRESETS)
def test_parts_add_up_to_the_module(name: str) -> None:
    counted = account(PRESETS[name])
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert counted.total == sum(prod(parameter.shape) for parameter in model.parameters())
    assert 0 < counted.activated <= counted.total
    assert 0 <= counted.activated_experts <= counted.experts


def test_building_the_16b_on_meta_is_instant() -> None:
    build(PRESETS["deepseek-moe-tiny"], device="meta")  # torch's own first-use cost
    start = time.perf_counter()
    model = build(PRESETS["deepseek-moe-16b"], dtype=torch.bfloat16, device="meta")
    assert time.perf_counter() - start < 5
    assert model.layers[27].mlp.experts.gate_up_proj.shape == (64, 2816, 2048)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.is_meta
