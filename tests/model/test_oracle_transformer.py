"""The whole model: causality, cache, dtypes, families by values, seeds, and that it exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_model.attention import KVCache, Place
from dsmoe_model.config import ModelConfig
from dsmoe_model.mlp import MLP
from dsmoe_model.moe import MoE
from dsmoe_model.norm import RMSNorm
from dsmoe_model.presets import PRESETS
from dsmoe_model.rope import rotary_table, rotate
from dsmoe_model.transformer import Transformer, build

SMALL = replace(
    PRESETS["deepseek-moe-tiny"],
    hidden_size=32,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    n_routed_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=11,
    initializer_range=0.2,
)
FAMILIES = {
    "deepseek": SMALL,
    "gshard": replace(SMALL, num_experts_per_tok=2, n_shared_experts=0, first_k_dense_replace=0),
    "switch": replace(SMALL, num_experts_per_tok=1, n_shared_experts=0),
    "hash": replace(SMALL, num_experts_per_tok=1, n_shared_experts=0, hash_routing=True, aux_loss_alpha=0.0),
    "dense": replace(SMALL, n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=0),
    "dense x4": replace(SMALL, n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=4),
    "tied": replace(SMALL, tie_word_embeddings=True),
    "every second": replace(SMALL, moe_layer_freq=2, first_k_dense_replace=0),
}


def ids_for(config: ModelConfig, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoding_over_the_cache_is_the_whole_sequence_at_once(name: str) -> None:
    config = FAMILIES[name]
    model = build(config, dtype=torch.float64)
    ids = ids_for(config)
    whole, routing = model(ids)
    assert 0.1 < whole.std() < 10
    cache = KVCache.zeros(config, 2, 12, torch.float64)
    parts = [model(ids[:, :5], cache).logits_BSV]
    for at in range(5, 9):
        parts.append(model(ids[:, at : at + 1], cache, torch.tensor([at])).logits_BSV)
    error = (torch.cat(parts, dim=1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert float(error.max()) < 1e-12
    assert len(routing) == sum(isinstance(m, MoE) and m.router is not None for m in model.modules())


@torch.no_grad()
def test_later_tokens_do_not_reach_earlier_logits() -> None:
    model = build(SMALL, dtype=torch.float64)
    ids = ids_for(SMALL)
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % SMALL.vocab_size
    before, after = model(ids).logits_BSV, model(other).logits_BSV
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-12, atol=1e-13)
    assert ((before[:, 6:] - after[:, 6:]).norm(dim=-1) > 0.1).all()


@torch.no_grad()
def test_a_used_cache_is_as_good_as_new() -> None:
    """Slots beyond the position hold another text: the mask must hide them."""
    model = build(SMALL, dtype=torch.float64)
    ids = ids_for(SMALL)
    used, new = KVCache.zeros(SMALL, 2, 12, torch.float64), KVCache.zeros(SMALL, 2, 12, torch.float64)
    model(ids.flip(1), used)
    for cache in (used, new):
        model(ids[:, :4], cache)
    decoded = [model(ids[:, 4:5], cache, torch.tensor([4])).logits_BSV for cache in (used, new)]
    assert torch.equal(*decoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dtypes_stay_near_float64_with_routing_fixed(dtype: torch.dtype) -> None:
    model = build(SMALL, dtype=dtype)
    ids = ids_for(SMALL)
    logits, routing = model(ids)
    assert logits.dtype == torch.float32
    exact, same = model.double()(ids, experts=[layer.experts_TK for layer in routing])
    assert exact.dtype == torch.float64
    assert all(torch.equal(a.experts_TK, b.experts_TK) for a, b in zip(routing, same, strict=True))
    error = (logits.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.max()) < 8 * torch.finfo(dtype).eps  # three layers, two roundings of the residual each


@pytest.mark.parametrize(("batch", "length"), [(1, 0), (0, 3), (1, 1), (3, 2)])
@torch.no_grad()
def test_any_number_of_tokens(batch: int, length: int) -> None:
    model, ids = build(SMALL), ids_for(SMALL, batch, length)
    whole, routing = model(ids)
    assert whole.shape == (batch, length, 260)
    assert routing[0].experts_TK.shape == (batch * length, 3)
    last = model(ids, last_only=True).logits_BSV
    assert last.shape == (batch, min(length, 1), 260)
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-4, atol=1e-5)


def test_layers_are_dense_or_mixed_as_the_config_says() -> None:
    kinds = [type(layer.mlp) for layer in build(replace(SMALL, num_hidden_layers=6, moe_layer_freq=2)).layers]
    assert kinds == [MLP, MLP, MoE, MLP, MoE, MLP]


def test_the_seed_and_nothing_else_decides_the_weights() -> None:
    one, same, other = (build(SMALL, seed=seed).requires_grad_(False) for seed in (3, 3, 4))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert name.endswith("norm.weight") or not torch.equal(tensor, other.state_dict()[name])
    weights = one.layers[1].mlp.experts.gate_up_proj
    assert float(weights.std()) == pytest.approx(0.2, rel=0.05)
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(one.norm.weight, torch.ones(32))
    hashed = build(FAMILIES["hash"]).layers[1].mlp.router.token_experts
    assert hashed.flatten().bincount().tolist() == [38] + [37] * 6


def test_tied_embeddings_stay_one_tensor() -> None:
    model = build(FAMILIES["tied"], dtype=torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight
    with torch.device("meta"):
        bare = Transformer(FAMILIES["tied"])
    assert bare.to_empty(device="cpu").lm_head.weight is bare.embed_tokens.weight


def test_what_decoding_and_forcing_refuse() -> None:
    model, ids = build(SMALL), ids_for(SMALL, 1, 2)
    cache = KVCache.zeros(SMALL, 1, 8, torch.float32)
    for arguments in (
        (ids[:, :1], None, torch.tensor([1])),
        (ids[:, :1], cache, torch.tensor(1)),
        (ids, cache, torch.tensor([1])),
    ):
        with pytest.raises(ValueError, match=r"position of shape \[1\]"):
            model(*arguments)
    with pytest.raises(ValueError, match="forces 1 layers, the model has 2"):
        model(ids, experts=[torch.zeros(2, 3, dtype=torch.int64)])


@torch.no_grad()
def test_attention_head_by_head_with_complex_rotation() -> None:
    """Query heads 0, 1 read key head 0, heads 2, 3 read key head 1; RoPE turns x_i + i x_(i + D/2) forward."""
    attention = build(SMALL, dtype=torch.float64).layers[0].self_attn
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    where = Place(torch.arange(6), *rotary_table(torch.arange(6), 8, 10000.0, torch.float64), None)
    turn = torch.polar(
        torch.ones(6, 4, dtype=torch.float64),
        torch.arange(6)[:, None].double() * torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=torch.float64),
    )

    def head(projected: Tensor, index: int) -> Tensor:
        return projected[0, :, 8 * index : 8 * index + 8]

    def turned(rows: Tensor) -> Tensor:
        return torch.complex(rows[:, :4], rows[:, 4:]) * turn

    heads = []
    for index in range(4):
        query = turned(head(attention.q_proj(x), index))
        key = turned(head(attention.k_proj(x), index // 2))
        affinity = (query @ key.mH).real / 8**0.5
        affinity = affinity.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
        heads.append(affinity.softmax(-1) @ head(attention.v_proj(x), index // 2))
    wanted = attention.o_proj(torch.cat(heads, dim=-1))
    assert 0.1 < wanted.std() < 10
    torch.testing.assert_close(attention(x, where)[0], wanted, rtol=1e-11, atol=1e-12)


def test_rotation_sees_only_distances() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def product(at: int, other: int) -> float:
        cos, sin = rotary_table(torch.tensor([at, other]), 16, 10000.0, torch.float64)
        return float((rotate(query, cos[:1], sin[:1]) * rotate(key, cos[1:], sin[1:])).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-10)
    assert product(7, 3) != pytest.approx(product(3, 7), rel=1e-3)
    # exact in float64, and in float32 what rounding the angle allows at position 4095
    cos, _ = rotary_table(torch.tensor([4095]), 16, 10000.0, torch.float64)
    assert float(cos[0, 1]) == pytest.approx(float(torch.tensor(4095 * 10000 ** (-2 / 16)).double().cos()), abs=1e-3)


def test_rmsnorm_normalises_in_float32() -> None:
    norm = RMSNorm(64, 1e-6).half()
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert torch.equal(norm(x), torch.ones_like(x))


class _Phase(torch.nn.Module):
    """One phase as the driver exports it: cache tensors in, logits and experts out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, keys: list[Tensor], values: list[Tensor], position: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits, routing = self.model(ids, KVCache(keys, values), position, last_only=True)
        return logits, torch.stack([layer.experts_TK for layer in routing])


@torch.no_grad()
def test_both_phases_export_with_a_free_number_of_tokens() -> None:
    config = replace(SMALL, num_hidden_layers=2)
    phase, ids = _Phase(build(config)).eval(), ids_for(config)

    def fresh() -> KVCache:
        return KVCache.zeros(config, 2, 12, torch.float32)

    cache, still = fresh(), [None, None]
    dynamic = {"ids": {1: torch.export.Dim.DYNAMIC}, "keys": still, "values": still, "position": None}
    prefill = torch.export.export(phase, (ids, cache.key, cache.value, None), dynamic_shapes=dynamic, strict=False)
    decode = torch.export.export(phase, (ids[:, :1], cache.key, cache.value, torch.tensor([9])), strict=False)
    for length in (0, 1, 7, 12):
        ours, theirs = fresh(), fresh()
        prompt = ids_for(config, 2, length)
        expected = phase(prompt, ours.key, ours.value, None)
        got = prefill.module()(prompt, theirs.key, theirs.value, None)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        at = torch.tensor([min(length, 11)])
        step = (ids[:, :1], ours.key, ours.value, at), (ids[:, :1], theirs.key, theirs.value, at)
        torch.testing.assert_close(decode.module()(*step[1]), phase(*step[0]), rtol=1e-5, atol=1e-6)
