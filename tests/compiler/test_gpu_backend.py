"""torch.compile(backend="dsmoe") on a GPU: the operators' kernels inside Inductor's graphs, CUDA graphs included."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch import Tensor

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.backend import dsmoe
from dsmoe_model.presets import preset
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import assert_within_budget
from dsmoe_runtime.ops import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SMALL = replace(preset("deepseek-moe-tiny"), num_hidden_layers=2, initializer_range=0.0625)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(dtype: torch.dtype = torch.bfloat16) -> Transformer:
    return build(SMALL, dtype=dtype, device="cuda", seed=1)


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_the_numbers_are_those_of_eager(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Several calls: a CUDA graph warms up, is captured, and is replayed with other tokens, that is, other experts."""
    eager, exact = model(), model(torch.float64)
    exact.load_state_dict(eager.state_dict())
    fast = torch.compile(model(), backend=dsmoe, mode=mode)
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            ids = prompt(16, seed)
            torch.compiler.cudagraph_mark_step_begin()
            compiled = fast(ids)
            chosen = [routing.experts_TK.clone() for routing in compiled.routing]
            logits = compiled.logits_BSV.clone()
            assert_within_budget(
                logits,
                eager=eager(ids, experts=chosen).logits_BSV,
                exact=exact(ids, experts=chosen).logits_BSV,
            )
    assert not [r.message for r in caplog.records if "cudagraph" in r.message.lower() or "plain torch" in r.message]


@torch.no_grad()
def test_what_the_kernels_refuse_runs_as_the_rule_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """float64: the rule waits for the device, so there is no CUDA graph, and two warnings say both."""
    cuda._say.cache_clear()
    exact = model(torch.float64)
    fast = torch.compile(model(torch.float64), backend=dsmoe, mode="reduce-overhead")
    with caplog.at_level(logging.WARNING):
        ours = fast(prompt(8)).logits_BSV
    torch.testing.assert_close(ours, exact(prompt(8)).logits_BSV, rtol=1e-9, atol=1e-9)
    text = "\n".join(r.message for r in caplog.records)
    assert "no CUDA graphs: dsmoe::route runs as plain torch on the GPU: float64 has no kernels" in text
    for name in ("route", "experts"):
        assert f"dsmoe::{name} runs as plain torch on the GPU, which is slow: float64 has no kernels" in text
