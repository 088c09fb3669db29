"""Attention through MLIR against float64: prefill, decoding, grouped heads, each kind of mask, strides, empty tails."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torch_mlir")

from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import InputError
from dsmoe_runtime.mlir.attention import attention, attention_kernel
from dsmoe_runtime.mlir.attention_lowering import attention_function
from dsmoe_runtime.mlir.attention_place import AttentionSpec
from dsmoe_runtime.mlir.formats import type_of
from dsmoe_runtime.mlir.levels import LEVELS, best_level, cpu_flags
from tests.runtime.op_cases import normal

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
DTYPES = [torch.float32, torch.bfloat16]
FACTOR = 4.0  # rows of few numbers have no average to hide a unit in the last place of a score in


def case(batch, heads, kv_heads, queries, slots, depth, width, dtype=torch.float32):
    q = normal(batch, queries, heads, depth, seed=1, dtype=dtype).transpose(1, 2)
    k = normal(batch, kv_heads, slots, depth, seed=2, dtype=dtype)
    return q, k, normal(batch, kv_heads, slots, width, seed=3, dtype=dtype)


def theirs(q, k, v, mask, causal, dtype):
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.to(dtype).repeat_interleave(group, dim=1) for tensor in (k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    return F.scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=mask, is_causal=causal)


def check(q, k, v, mask=None, causal=False):
    y = attention(q, k, v, mask, causal=causal)
    eager, exact = (theirs(q, k, v, mask, causal, dtype).flatten(0, 2) for dtype in (q.dtype, torch.float64))
    assert_within_budget(y.flatten(0, 2), eager=eager, exact=exact, factor=FACTOR)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [0, 1, 2, 3, 4, 7, 16, 63, 300])
def test_causal_prefill(dtype, queries):
    y = check(*case(1, 4, 2, queries, queries, 64, 64, dtype), causal=True)
    assert y.shape == (1, 4, queries, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(2, 2, 2, 1, 77, 64, 64), (1, 8, 1, 1, 100, 42, 27), (1, 8, 2, 7, 33, 64, 32), (1, 3, 1, 1, 5, 7, 3),
              (1, 2, 1, 20, 200, 24, 9), (2, 6, 2, 1, 130, 128, 128), (1, 2, 2, 40, 70, 192, 128)]
)  # fmt: skip
def test_odd_sizes_and_groups(dtype, sizes):
    check(*case(*sizes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 3, 20, 70])
def test_bool_masks(dtype, queries):
    q, k, v = case(2, 4, 2, queries, 90, 32, 40, dtype)
    mask = torch.rand(queries, 90, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[:, 0] = True
    mask[:, 61:] = False
    check(q, k, v, mask)
    each = mask.repeat(2, 1, 1, 1)
    each[1, :, :, 5] = True
    check(q, k, v, each)
    check(q, k, v, mask[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_added_masks(dtype, queries, hidden):
    q, k, v = case(1, 4, 2, queries, 90, 32, 40, dtype)
    mask = normal(1, 1, queries, 90, seed=5)
    mask[..., 50:] = hidden
    mask[..., 3] = hidden
    check(q, k, v, mask.to(dtype))


@pytest.mark.parametrize("queries", [1, 3, 5, 20])
@pytest.mark.parametrize("added", [False, True])
def test_a_query_that_sees_nothing_gets_nothing(queries, added):
    q, k, v = case(1, 2, 2, queries, 40, 16, 16)
    mask = torch.ones(queries, 40, dtype=torch.bool)
    mask[queries // 2] = False
    given = torch.zeros(queries, 40).masked_fill(~mask, -math.inf) if added else mask
    y = attention(q, k, v, given)
    assert torch.equal(y[:, :, queries // 2], torch.zeros(1, 2, 16))
    rest = torch.arange(queries) != queries // 2
    assert torch.equal(y[:, :, rest], attention(q, k, v)[:, :, rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "queries"), [(2, 1), (8, 1), (2, 30)])
def test_a_hidden_tail_of_slots_is_not_read(dtype, heads, queries):
    """A cache of 5000 slots with 37 in use, and NaN in all others."""
    q, k, v = case(1, heads, 2, queries, 37, 32, 32, dtype)
    expected = attention(q, k, v)
    cache_k, cache_v = (torch.full((1, 2, 5000, 32), torch.nan, dtype=dtype) for _ in range(2))
    cache_k[:, :, :37], cache_v[:, :, :37] = k, v
    assert torch.equal(attention(q, cache_k, cache_v, (torch.arange(5000) < 37)[None]), expected)


@pytest.mark.parametrize("queries", [1, 30])
def test_strides_and_same_bits_for_any_number_of_threads(queries):
    q, k, v = case(2, 4, 2, queries, 200, 32, 32)
    expected = attention(q, k, v)
    assert torch.equal(attention(q.contiguous(), k, v), expected)
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    assert torch.equal(attention(q, turned, v), expected)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(attention(q, k, v), expected)
    torch.set_num_threads(before)


def test_what_does_not_fit_is_refused():
    q, k, v = case(1, 4, 2, 3, 5, 8, 8)
    with pytest.raises(InputError, match="do not fit"):
        attention(q[:, :3], k, v)
    with pytest.raises(InputError, match="exclude each other"):
        attention(q, k, v, torch.ones(3, 5, dtype=torch.bool), causal=True)
    with pytest.raises(InputError, match="cast two"):
        attention(q.double(), k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_code_for_few_queries_alone_gives_the_same_bits(dtype):
    """What a decode step is compiled to: one query and two heads of it for each head of keys."""
    q, k, v = case(1, 4, 2, 1, 90, 64, 64, dtype)
    mask = (torch.arange(90) < 70)[None]
    spec = AttentionSpec(type_of(dtype), "i1", 0.125, best_level(), few=True)
    y = torch.full_like(q, torch.nan)
    attention_kernel(spec)([q, k, v, mask[None, None], y])
    assert torch.equal(y, check(q, k, v, mask))
    assert "attend_many" not in attention_function(spec).source
