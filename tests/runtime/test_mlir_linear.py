"""nn.Linear through MLIR against float64: one token to many, odd sizes, strides, and nothing written beyond."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torch_mlir")

from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import InputError
from dsmoe_runtime.mlir.levels import LEVELS, best_level, cpu_flags
from dsmoe_runtime.mlir.linear import in_rows, linear, linear_kernel
from dsmoe_runtime.mlir.linear_lowering import LinearSpec
from tests.runtime.op_cases import normal, weight

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
DTYPES = [torch.float32, torch.bfloat16]


def case(tokens, rows, size, dtype, bias=False):
    x, w = normal(tokens, size, seed=1, dtype=dtype), weight(rows, size, seed=2, dtype=dtype)
    return x, w, normal(rows, seed=3, dtype=dtype) if bias else None


def check(x, w, bias, dtype=None):
    y = linear(x, w, bias, dtype=dtype)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    if dtype is None:
        eager = F.linear(x, w, bias)
    else:
        eager = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    assert y.dtype == eager.dtype
    assert_within_budget(y, eager=eager, exact=exact)
    return y


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 8, 16, 17, 63, 130, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_tokens(tokens, dtype, bias):
    y = check(*case(tokens, 200, 300, dtype, bias))
    assert y.shape == (tokens, 200)


@pytest.mark.parametrize(("rows", "size"), [(5, 42), (97, 1000), (64, 7), (1000, 64), (12, 256), (101, 513)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(rows, size, tokens, dtype):
    check(*case(tokens, rows, size, dtype))


@pytest.mark.parametrize("tokens", [1, 40])
def test_logits_in_float32(tokens):
    check(*case(tokens, 333, 128, torch.bfloat16), dtype=torch.float32)


@pytest.mark.parametrize("tokens", [1, 9, 13, 31, 140])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_written_and_nothing_else(tokens, dtype):
    """The output is a window of a larger tensor of NaN: all of it is filled, none of its surroundings."""
    x, w, _ = case(tokens, 45, 70, dtype)
    around = torch.full((tokens + 2, 60), torch.nan, dtype=dtype)
    kernel = linear_kernel(LinearSpec(*["f32" if dtype == torch.float32 else "bf16"] * 2, None, best_level()))
    kernel([x, w, around[1:-1, 8:53]])
    assert torch.equal(around[1:-1, 8:53], linear(x, w))
    assert not around[1:-1, 8:53].isnan().any()
    assert around[[0, -1]].isnan().all()
    assert around[:, :8].isnan().all()
    assert around[:, 53:].isnan().all()


@pytest.mark.parametrize("tokens", [3, 50])
def test_strides_offsets_and_same_bits_for_any_number_of_threads(tokens):
    x, w, bias = case(tokens, 700, 300, torch.float32, True)
    expected = linear(x, w, bias)
    wide_x, wide_w = torch.zeros(tokens, 500), torch.zeros(700, 401)
    wide_x[:, 100:400], wide_w[:, 50:350] = x, w
    assert torch.equal(linear(wide_x[:, 100:400], wide_w[:, 50:350], bias), expected)
    assert torch.equal(linear(x.T.contiguous().T, w, bias), expected)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(linear(x, w, bias), expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [9, 50])
def test_nan_stays_in_its_row(tokens):
    x, w, _ = case(tokens, 50, 64, torch.float32)
    clean = linear(x, w)
    x[4, 10] = torch.nan
    y = linear(x, w)
    assert y[4].isnan().all()
    y[4] = clean[4]
    assert torch.equal(y, clean)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"want \[M, K\]"):
        linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match="bias is"):
        linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3))
    assert in_rows(torch.ones(3, 2).T).stride(-1) == 1
