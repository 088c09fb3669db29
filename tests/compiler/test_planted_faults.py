"""The shipped proof catches what is planted: faults in the operator, and faults that only an artifact can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmoe_model.attention import KVCache
from tests.compiler.stand_in import Op, StandInRunner, fused_layers, model_of, verified

DTYPES = [torch.float32, torch.bfloat16]
FAULTY_LAYER = 2


# Faults in dsmoe::moe, through its CPU rule taken apart: route, then experts, then the shared experts.


def taken_apart(x_TH: Tensor, arguments: tuple[Any, ...], change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
    """dsmoe::moe with `change(weights, experts)` between the gate and the experts; reports the experts that it used."""
    router, _, bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale, _ = arguments[:12]
    logits_TE = x_TH.float() @ router.float().T
    weights_TK, experts_TK = torch.ops.dsmoe.route(
        logits_TE, bias, top_k, score, n_group, topk_group, group_score, renormalize, eps, scale
    )
    weights_TK, experts_TK = change(weights_TK, experts_TK)
    y_TH = torch.ops.dsmoe.experts(x_TH, experts_TK, weights_TK, *arguments[12:20])
    if arguments[20] is not None:
        gate_TS, up_TS = (x_TH @ arguments[20].T).chunk(2, dim=-1)
        y_TH = y_TH + (nn.functional.silu(gate_TS) * up_TS) @ arguments[21].T
    return y_TH, experts_TK


def zeros(x_TH: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    y_TH, experts_TK = torch.ops.dsmoe.moe(x_TH, *arguments)
    return torch.zeros_like(y_TH), experts_TK


def last_row(value: float) -> Op:
    def op(x_TH: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y_TH, experts_TK = torch.ops.dsmoe.moe(x_TH, *arguments)
        y_TH[-1:] = value
        return y_TH, experts_TK

    return op


def changed(change: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]], *, honest: bool = True) -> Op:
    """`change(weights, experts, E)`; if not `honest`, the experts reported are those that should have been used."""

    def op(x_TH: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y_TH, used_TK = taken_apart(x_TH, arguments, lambda w_TK, e_TK: change(w_TK, e_TK, arguments[0].shape[0]))
        return y_TH, used_TK if honest else torch.ops.dsmoe.moe(x_TH, *arguments)[1]

    return op


def misroute_last(weights_TK: Tensor, experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The last token goes to the K experts after those that it should go to; the weights stay."""
    experts_TK = experts_TK.clone()
    for row in experts_TK[-1:]:
        left = [expert for expert in range(n_experts) if expert not in row]
        row.copy_(torch.tensor(left[: len(row)]))
    return weights_TK, experts_TK


def second_plus_one(weights_TK: Tensor, experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    experts_TK = experts_TK.clone()
    experts_TK[:, 1] = (experts_TK[:, 1] + 1) % n_experts
    return weights_TK, experts_TK


def drop_last(weights_TK: Tensor, experts_TK: Tensor, _n_experts: int) -> tuple[Tensor, Tensor]:
    return torch.cat((weights_TK[:, :-1], torch.zeros_like(weights_TK[:, -1:])), dim=1), experts_TK


def gate_and_up_swapped(x_TH: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gate, up = arguments[12].chunk(2, dim=1)
    return torch.ops.dsmoe.moe(x_TH, *arguments[:12], torch.cat((up, gate), dim=1), *arguments[13:])


def scaled(weights_TK: Tensor, experts_TK: Tensor, _n_experts: int) -> tuple[Tensor, Tensor]:
    return weights_TK * 1.02, experts_TK


OPERATOR_FAULTS: dict[str, Op] = {
    "zeros": zeros,
    "last row NaN": last_row(math.nan),
    "last row garbage": last_row(0.37),
    "one token misrouted": changed(misroute_last),
    "one token misrouted, not reported": changed(misroute_last, honest=False),
    "second id + 1": changed(second_plus_one),
    "second id + 1, not reported": changed(second_plus_one, honest=False),
    "last of K dropped": changed(drop_last),
    "weights x 1.02": changed(scaled),
    "gate and up swapped": gate_and_up_swapped,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_taken_apart_is_faithful(dtype: torch.dtype) -> None:
    """The base of the faults below passes, so what they fail by is the fault."""
    model, op = model_of(dtype), changed(lambda w_TK, e_TK, _: (w_TK, e_TK))
    ops = dict.fromkeys((1, 2, 3), op)
    verification = verified(model, StandInRunner(model, ops), fused_layers(model, ops))
    assert verification.ok, str(verification)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", OPERATOR_FAULTS)
def test_a_faulty_operator_is_caught_and_its_layer_named(fault: str, dtype: torch.dtype) -> None:
    model, ops = model_of(dtype), {FAULTY_LAYER: OPERATOR_FAULTS[fault]}
    verification = verified(model, StandInRunner(model, ops), fused_layers(model, ops))
    failed = [check.name for check in verification.checks if not check.ok]
    assert f"layers.{FAULTY_LAYER}.mlp" in failed, str(verification)
    assert not {"layers.1.mlp", "layers.3.mlp"} & set(failed), str(verification)
    assert verification.first_diverging_layer == f"layers.{FAULTY_LAYER}.mlp", str(verification)


# Faults in an artifact: every operator is faithful by itself, only the runs can tell.


class WrongLayer(StandInRunner):
    """Layer 2 runs with the routed experts of layer 3."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        ours, other = self.model.layers[FAULTY_LAYER].mlp, self.model.layers[3].mlp
        ours.arguments = (*ours.arguments[:12], *other.arguments[12:14], *ours.arguments[14:])


class StaleRow(StandInRunner):
    """Decoding leaves layer 2's key and value of one position as they were."""

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        before = cache.key[FAULTY_LAYER][:, :, position].clone(), cache.value[FAULTY_LAYER][:, :, position].clone()
        result = super().decode(ids_B1, position, cache)
        if position == 8:
            cache.key[FAULTY_LAYER][:, :, position], cache.value[FAULTY_LAYER][:, :, position] = before
        return result


class LatePosition(StandInRunner):
    """Decoding is one position late, in the rotation, the mask and the slot."""

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        return super().decode(ids_B1, position + 1, cache)


class WrongRotation(StandInRunner):
    """Decoding rotates the key of position 50 as if it stood at 51, in layer 2 only."""

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        result = super().decode(ids_B1, position, cache)
        if position == 50:
            key_BHD = cache.key[FAULTY_LAYER][:, :, position]
            first, second = key_BHD.clone().chunk(2, dim=-1)
            half = first.shape[-1]
            angle = (1 / 10000 ** (torch.arange(half) / half)).to(key_BHD.dtype)
            cos, sin = angle.cos(), angle.sin()
            key_BHD.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
        return result


class StrayWrite(StandInRunner):
    """The last slot of the cache is overwritten, as by an index of -1."""

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        cache.value[0][:, :, -1] = 1
        return super().prefill(ids_BS, cache)


class HeadOffByOne(StandInRunner):
    """The logits are those of the position before the last."""

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        logits_BV, experts = super().prefill(ids_BS, cache)
        if ids_BS.shape[1] > 1:
            logits_BV = self.model(ids_BS[:, :-1]).logits_BSV[:, -1]
        return logits_BV, experts


class Drifting(StandInRunner):
    """The second run differs from the first by one rounding of one logit."""

    calls = 0

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        logits_BV, experts = super().prefill(ids_BS, cache)
        self.calls += 1
        if self.calls == 5:
            logits_BV[0, 0] = logits_BV[0, 0].nextafter(torch.tensor(math.inf))
        return logits_BV, experts


class ReadsOldSlots(StandInRunner):
    """The result depends on what the cache held before: right in a new cache, wrong in a used one."""

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        old = cache.value[0][:, :, ids_BS.shape[1]].abs().sum()
        logits_BV, experts = super().prefill(ids_BS, cache)
        return logits_BV + old, experts


class ForeignExperts(StandInRunner):
    """Reports an expert that does not exist."""

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        logits_BV, experts = super().decode(ids_B1, position, cache)
        experts[1] = experts[1] + 7
        return logits_BV, experts


class NaNLogit(StandInRunner):
    """One logit of one step is NaN."""

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        logits_BV, experts = super().decode(ids_B1, position, cache)
        if position == 8:
            logits_BV[0, 5] = math.nan
        return logits_BV, experts


ARTIFACT_FAULTS = {  # which check must notice, and which layer is named
    WrongLayer: ("keys and values", "layers.2.mlp"),
    StaleRow: ("keys and values", "layers.2.mlp"),
    LatePosition: ("keys and values", "layers.0"),
    WrongRotation: ("keys and values", "layers.2.mlp"),
    StrayWrite: ("keys and values", None),
    HeadOffByOne: ("logits", "layers.3.mlp"),
    Drifting: ("repeat", None),
    ReadsOldSlots: ("repeat", None),
    ForeignExperts: ("routing", "layers.2.mlp"),
    NaNLogit: ("logits", "layers.3.mlp"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ARTIFACT_FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_artifact_is_caught_by_its_runs(fault: type[StandInRunner], dtype: torch.dtype) -> None:
    model = model_of(dtype)
    verification = verified(model, fault(model))
    check, layer = ARTIFACT_FAULTS[fault]
    assert check in [check.name for check in verification.checks if not check.ok], str(verification)
    assert verification.first_diverging_layer == layer, str(verification)
