"""Configs from strangers are refused by name, with both values, before anything is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import ConfigError
from dsmoe_model.presets import PRESETS, preset

TINY = PRESETS["deepseek-moe-tiny"]
_NOT_INTEGERS = [-1, 10**9, 10**5000, "64", "9" * 10**6, True, 1.0, float("nan"), None, {"a": [1]}]
_NOT_NUMBERS = [-1.0, float("inf"), float("nan"), "1e-6", False, None, [1.0], 10**5000]


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip(name: str) -> None:
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 33}, ["num_experts_per_tok = 33", "n_routed_experts = 32"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok = 0", "n_routed_experts = 32"]),
        ({"n_group": 4, "topk_group": 5}, ["topk_group = 5", "n_group = 4"]),
        ({"n_group": 5}, ["n_routed_experts = 32", "n_group = 5"]),
        ({"n_group": 32, "topk_group": 8, "group_score": "top2"}, ["top2", "n_group = 32", "leaves 1"]),
        ({"n_group": 16, "topk_group": 1}, ["num_experts_per_tok = 4", "topk_group = 1", "n_group = 16", "2 experts"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size = 0", "n_routed_experts = 32"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads = 4", "num_key_value_heads = 3"]),
        ({"head_dim": 63}, ["head_dim = 63"]),
        ({"eos_token_id": 260}, ["eos_token_id = 260", "vocab_size = 260"]),
        ({"first_k_dense_replace": 5}, ["first_k_dense_replace = 5", "num_hidden_layers = 4"]),
        ({"n_devices": 3}, ["n_routed_experts = 32", "n_devices = 3"]),
        ({"hash_routing": True}, ["hash_routing = True", "num_experts_per_tok = 1", "got 4"]),
    ],
)
def test_fields_at_odds_are_both_named(changes: dict, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(TINY, **changes)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize("name", [n for n, kind in ModelConfig.__annotations__.items() if kind == "int"])
@pytest.mark.parametrize("value", _NOT_INTEGERS, ids=range(len(_NOT_INTEGERS)))
def test_integers_must_be_integers_in_bounds(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        replace(TINY, **{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [n for n, kind in ModelConfig.__annotations__.items() if kind == "float"])
@pytest.mark.parametrize("value", _NOT_NUMBERS, ids=range(len(_NOT_NUMBERS)))
def test_numbers_must_be_numbers_in_bounds(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(TINY, **{name: value})


@pytest.mark.parametrize("name", [n for n, kind in ModelConfig.__annotations__.items() if kind in ("bool", "str")])
@pytest.mark.parametrize("value", [0, 1.5, None, "false", ["softmax"]])
def test_flags_and_choices(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(TINY, **{name: value})


def test_an_integer_serves_as_a_number() -> None:
    assert type(replace(TINY, rope_theta=10000).rope_theta) is float


def test_unknown_missing_and_shapeless() -> None:
    with pytest.raises(ConfigError, match=r"'num_expert_per_tok'.*'num_experts_per_tok'"):
        ModelConfig.from_dict({**TINY.to_dict(), "num_expert_per_tok": 2})
    with pytest.raises(ConfigError, match="config lacks hidden_size"):
        ModelConfig.from_dict({name: value for name, value in TINY.to_dict().items() if name != "hidden_size"})
    with pytest.raises(ConfigError, match="mapping"):
        ModelConfig.from_dict([1, 2])  # type: ignore[arg-type]


def test_an_unknown_preset_is_told_the_close_ones_first() -> None:
    with pytest.raises(ConfigError, match=r"'deepseek-moe-16'; the presets are deepseek-moe-16b,"):
        preset("deepseek-moe-16")
