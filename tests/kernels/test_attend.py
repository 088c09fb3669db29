"""dsmoe::attend's kernels against float64: parts that see nothing, odd widths, any strides, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dsmoe_runtime.ops  # noqa: F401  registers the operator
from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.errors import CaptureError, InputError
from dsmoe_runtime.kernels.attend import BLOCK, MOST_PARTS, attend, refusal, span_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poison")


def case(heads: int, slots: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(slots)
    query = torch.randn(1, 1, heads, width, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, heads, slots, width, generator=generator).to(dtype) for _ in range(2))
    return query, key, value


def run(device: str, *tensors: Tensor) -> Tensor:
    scale = tensors[0].shape[-1] ** -0.5
    if device == "cpu":
        return attend(*tensors, scale)
    return torch.ops.dsmoe.attend(*(tensor.to(device) for tensor in tensors), scale).cpu()  # type: ignore[no-any-return]


def check(device: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    y = run(device, query, key, value, mask)
    eager, exact = (
        F.scaled_dot_product_attention(query.to(d), key.to(d), value.to(d), attn_mask=mask.reshape(1, -1))
        for d in (query.dtype, torch.float64)
    )
    assert y.dtype == query.dtype
    assert_within_budget(y.flatten(0, 2), eager=eager.flatten(0, 2), exact=exact.flatten(0, 2))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "slots", "width"), [(2, 1, 16), (3, 70, 24), (1, 300, 128), (2, 1100, 7)])
def test_against_float64(device: str, heads: int, slots: int, width: int, dtype: torch.dtype) -> None:
    check(device, *case(heads, slots, width, dtype), torch.arange(slots)[None] < max(1, slots - 7))


def test_what_is_not_seen_is_not_read(device: str) -> None:
    """Most parts see nothing, the first ones neither; NaN in their slots must not reach the answer."""
    query, key, value = case(2, 150, 32, torch.bfloat16)
    mask = torch.zeros(1, 1, 150, dtype=torch.bool)
    mask[..., 60:63] = True
    mask[..., 99] = True
    expected = check(device, query, key, value, mask)
    key[:, :, ~mask[0, 0]], value[:, :, ~mask[0, 0]] = torch.nan, torch.inf
    assert torch.equal(run(device, query, key, value, mask), expected)


def test_a_cache_that_is_a_view(device: str) -> None:
    query, key, value = case(2, 40, 64, torch.float32)
    wide = torch.randn(1, 3, 50, 80, generator=torch.Generator().manual_seed(1))
    wide[:, 1:, :40, :64] = key
    check(device, query, wide[:, 1:, :40, :64], value, torch.arange(40) < 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_same_bits_on_every_run_and_from_a_graph() -> None:
    query, key, value = (tensor.cuda() for tensor in case(16, 4096, 128, torch.bfloat16))
    mask = torch.arange(4096, device="cuda") < 513
    expected, graph = torch.ops.dsmoe.attend(query, key, value, mask, 0.1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.dsmoe.attend(query, key, value, mask, 0.1)
    for _ in range(100):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
    mask.fill_(True)
    graph.replay()
    assert torch.equal(y, torch.ops.dsmoe.attend(query, key, value, mask, 0.1))


@pytest.mark.parametrize("slots", [1, 16, 17, 1024, 1025, 4096, 4097, 131072, 1000003])
def test_few_parts_cover_all_slots(slots: int) -> None:
    assert span_of(slots) % BLOCK == 0
    assert slots <= MOST_PARTS * span_of(slots)


def test_the_operator_is_the_rule_on_a_cpu_and_checks_its_arguments() -> None:
    query, key, value = case(2, 9, 8, torch.float32)
    mask = torch.arange(9) < 5
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None])
    assert torch.equal(torch.ops.dsmoe.attend(query, key, value, mask, 8**-0.5), expected)
    for wrong in (mask[:8], mask.float()):
        with pytest.raises(InputError, match="a bool for each of 9 slots"):
            torch.ops.dsmoe.attend(query, key, value, wrong, 1.0)
    torch.library.opcheck(torch.ops.dsmoe.attend.default, (query, key, value, mask, 0.3))
    with pytest.raises(CaptureError, match="Differentiate scaled_dot_product_attention"):
        torch.ops.dsmoe.attend(query.requires_grad_(), key, value, mask, 1.0).sum().backward()
    with pytest.raises(InputError, match=r"query \[1, A, 1, D\]"):
        torch.ops.dsmoe.attend(query.repeat(2, 1, 1, 1), key, value, mask, 1.0)
    with pytest.raises(InputError, match=r"query \[1, A, 1, D\]"):
        torch.ops.dsmoe.attend(query[0, 0], key, value, mask, 1.0)


def test_what_the_kernels_refuse() -> None:
    query, key, value = case(1, 9, 8, torch.float32)
    assert refusal(query, key, value) is None
    assert "side by side" in str(refusal(query, key.mT.contiguous().mT, value))
    assert "300 wide" in str(refusal(*case(1, 4, 300, torch.float32)))
