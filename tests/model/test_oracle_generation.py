"""Generation: the cache changes nothing, seeds repeat, and every setting does what its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsmoe_model.attention import KVCache
from dsmoe_model.generation import generate, sample
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import Transformer, build

CONFIG = replace(
    PRESETS["deepseek-moe-tiny"],
    hidden_size=32,
    num_hidden_layers=2,
    head_dim=8,
    intermediate_size=48,
    n_routed_experts=7,
    moe_intermediate_size=11,
    max_position_embeddings=32,
    initializer_range=0.2,
)
PROMPT = torch.tensor([[256, 72, 105], [256, 74, 111]])


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG, dtype=torch.float64)


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_whole_text_again_and_again(model: Transformer) -> None:
    ids = PROMPT
    for _ in range(12):
        ids = torch.cat((ids, model(ids).logits_BSV[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=12), ids)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=12, temperature=1.0, top_k=1), ids)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=12, temperature=1.0, top_p=1e-9), ids)
    assert torch.equal(generate(model, PROMPT[:1], max_new_tokens=12), ids[:1])


def test_seeds_repeat_and_differ(model: Transformer) -> None:
    def text(seed: int) -> list[list[int]]:
        return generate(model, PROMPT, max_new_tokens=8, temperature=1.0, seed=seed).tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1)[0][3:] != text(1)[1][3:]


def test_a_finished_row_is_filled_and_all_finished_rows_stop(model: Transformer) -> None:
    free = generate(model, PROMPT, max_new_tokens=12)
    first = free[0, 5].item()
    stopped = generate(model, PROMPT, max_new_tokens=12, eos_token_id=first)
    at = free[0].tolist().index(first, 3)
    assert stopped[0, : at + 1].tolist() == free[0, : at + 1].tolist()
    assert set(stopped[0, at:].tolist()) == {first}
    alone = generate(model, PROMPT[:1], max_new_tokens=12, eos_token_id=first)
    assert alone.tolist() == free[:1, : at + 1].tolist()


def test_a_cache_may_be_handed_in_and_used_again(model: Transformer) -> None:
    cache = KVCache.zeros(CONFIG, 2, 20, torch.float64)
    once = generate(model, PROMPT, max_new_tokens=9, cache=cache)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=9, cache=cache), once)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=9), once)


def test_nothing_to_do(model: Transformer) -> None:
    assert torch.equal(generate(model, PROMPT, max_new_tokens=0), PROMPT)
    assert generate(model, PROMPT[:0], max_new_tokens=2).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_new_tokens": 30}, "3 prompt tokens and max_new_tokens = 30.*max_position_embeddings = 32"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"ids_BS": PROMPT[:, :0]}, "the prompt is empty"),
        ({"ids_BS": PROMPT + 4}, r"ids span \[76, 260\], vocab_size = 260"),
        ({"ids_BS": PROMPT.float()}, "int64"),
        ({"ids_BS": PROMPT[0]}, r"\[B, S\]"),
        ({"cache": KVCache.zeros(CONFIG, 1, 20, torch.float64)}, "1 rows of 20 positions; 2 rows of 7"),
        ({"cache": KVCache.zeros(CONFIG, 2, 6, torch.float64)}, "2 rows of 6 positions; 2 rows of 7"),
    ],
)
def test_refusals(model: Transformer, arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate(model, **{"ids_BS": PROMPT, "max_new_tokens": 4, **arguments})


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()

    def shares(**settings: float) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        drawn = sample(logits.expand(5000, 4), generator=generator, **settings)
        return (drawn.bincount(minlength=4) / 5000).tolist()

    close = {"abs": 0.03}  # four standard deviations of 5000 draws
    assert shares(temperature=1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4], **close)
    assert shares(temperature=0.5) == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], **close)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0, 0, 3 / 7, 4 / 7], **close)
    assert shares(temperature=1.0, top_p=0.65) == pytest.approx([0, 0, 3 / 7, 4 / 7], **close)
    assert shares(temperature=1.0, top_p=0.75) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9], **close)
    assert shares(temperature=1.0, top_k=2, top_p=0.5) == pytest.approx([0, 0, 0, 1], **close)
    assert shares() == [0, 0, 0, 1]


def test_ties_take_the_lowest_id_and_nan_takes_none() -> None:
    assert sample(torch.tensor([[1.0, 3.0, 3.0]])).tolist() == [1]
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        sample(torch.tensor([[1.0, 2.0], [1.0, float("nan")]]))
