"""Balance losses, eq. (12)-(17), against the sums written out, and their value at perfect balance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_model.losses import balance_loss, device_balance_loss, expert_balance_loss
from dsmoe_model.presets import PRESETS
from dsmoe_model.router import Routing


def routed(sequences: int = 3, length: int = 8, experts: int = 6, top_k: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    scores = torch.randn(sequences * length, experts, dtype=torch.float64).softmax(-1)
    return scores, scores.topk(top_k).indices


def test_both_losses_are_their_equations() -> None:
    scores, chosen = routed()
    expert_level, device_level = [], []
    for start in (0, 8, 16):
        f, p = [], []
        for expert in range(6):
            picks = sum(expert in row for row in chosen[start : start + 8].tolist())
            f.append(6 / (2 * 8) * picks)  # eq. (13)
            p.append(float(scores[start : start + 8, expert].sum()) / 8)  # eq. (14)
        expert_level.append(0.01 * sum(a * b for a, b in zip(f, p, strict=True)))  # eq. (12)
        halves = (range(3), range(3, 6))
        device_level.append(0.05 * sum(sum(f[e] for e in half) / 3 * sum(p[e] for e in half) for half in halves))
    expert = expert_balance_loss(scores, chosen, n_sequences=3, alpha=0.01)
    device = device_balance_loss(scores, chosen, n_sequences=3, n_devices=2, alpha=0.05)
    assert float(expert) == pytest.approx(sum(expert_level) / 3, rel=1e-12)
    assert float(device) == pytest.approx(sum(device_level) / 3, rel=1e-12)
    assert float(expert) != pytest.approx(float(expert_balance_loss(scores, chosen, n_sequences=1, alpha=0.01)))


def test_perfect_balance_costs_exactly_alpha() -> None:
    chosen = torch.arange(12).reshape(6, 2) % 6
    scores = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    assert float(expert_balance_loss(scores, chosen, n_sequences=1, alpha=0.01)) == pytest.approx(0.01, rel=1e-14)
    device = device_balance_loss(scores, chosen, n_sequences=1, n_devices=3, alpha=0.05)
    assert float(device) == pytest.approx(0.05, rel=1e-14)


def test_collapse_costs_experts_over_top_k() -> None:
    scores = torch.eye(6, dtype=torch.float64)[:1].expand(4, 6)
    loss = expert_balance_loss(scores, torch.zeros(4, 1, dtype=torch.int64), n_sequences=1, alpha=0.01)
    assert float(loss) == pytest.approx(0.06)


def test_one_device_an_expert_is_the_expert_loss() -> None:
    scores, chosen = routed()
    expert = expert_balance_loss(scores, chosen, n_sequences=3, alpha=0.3)
    assert torch.equal(device_balance_loss(scores, chosen, n_sequences=3, n_devices=6, alpha=0.3), expert)


def test_gradient_goes_through_the_scores_only_and_lowers_the_busy_expert() -> None:
    scores, _ = routed()
    scores.requires_grad_(True)
    expert_balance_loss(scores, torch.tensor([[4, 1]] * 24), n_sequences=3, alpha=1.0).backward()
    assert scores.grad[:, [4, 1]].min() > 0
    assert scores.grad[:, [0, 2, 3, 5]].abs().max() == 0


def test_uneven_sequences_and_devices_are_refused_and_no_tokens_cost_nothing() -> None:
    scores, chosen = routed()
    with pytest.raises(ValueError, match=r"24 tokens .* n_sequences = 5"):
        expert_balance_loss(scores, chosen, n_sequences=5, alpha=1.0)
    with pytest.raises(ValueError, match=r"6 experts .* n_devices = 4"):
        device_balance_loss(scores, chosen, n_sequences=3, n_devices=4, alpha=1.0)
    assert expert_balance_loss(scores[:0], chosen[:0], n_sequences=3, alpha=1.0) == 0


def test_balance_loss_follows_the_config() -> None:
    scores, chosen = routed(experts=32, top_k=4)
    layers = [Routing(scores.gather(1, chosen), chosen, scores)] * 2
    config = replace(PRESETS["deepseek-moe-tiny"], aux_loss_alpha=0.003, device_loss_alpha=0.05, n_devices=4)
    wanted = 2 * expert_balance_loss(scores, chosen, n_sequences=3, alpha=0.003)
    wanted = wanted + 2 * device_balance_loss(scores, chosen, n_sequences=3, n_devices=4, alpha=0.05)
    assert float(balance_loss(layers, config, batch_size=3)) == pytest.approx(float(wanted), rel=1e-12)
    whole = balance_loss(layers, replace(config, seq_aux=False), batch_size=3)
    assert float(whole) == pytest.approx(float(balance_loss(layers, config, batch_size=1)), rel=1e-12)
    sigmoid = replace(config, scoring_func="sigmoid")  # scores are normalised first: any common factor is immaterial
    doubled = [Routing(layer.weights_TK, layer.experts_TK, layer.scores_TE * 2) for layer in layers]
    assert float(balance_loss(doubled, sigmoid, batch_size=3)) == pytest.approx(float(wanted), rel=1e-12)
    assert balance_loss([], config, batch_size=3) == 0
