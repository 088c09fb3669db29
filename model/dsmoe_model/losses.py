"""The balance losses: expert level, eq. (12)-(14), and device level, eq. (15)-(17).

Letters: T tokens, E routed experts (the paper's N'), K experts per token (K'), N sequences, S tokens a sequence,
D devices. f counts choices and has no gradient; P is the mean score, where the gradient goes. Both losses equal alpha
at perfect balance. The paper's T is one sequence: with N sequences in a batch the loss is the mean over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_model.config import ModelConfig
from dsmoe_model.router import Routing


def expert_balance_loss(scores_TE: Tensor, experts_TK: Tensor, *, n_sequences: int, alpha: float) -> Tensor:
    """alpha_1 sum_i f_i P_i, a scalar; the T tokens are `n_sequences` sequences of equal length, one after another.

    f_i = E / (K S) * choices of expert i, P_i = mean score of expert i (eq. 13-14). No tokens: 0.
    """
    load_NE, score_NE = _load_and_score(scores_TE, experts_TK, n_sequences)
    return alpha * (load_NE * score_NE).sum(dim=-1).mean()


def device_balance_loss(
    scores_TE: Tensor, experts_TK: Tensor, *, n_sequences: int, n_devices: int, alpha: float
) -> Tensor:
    """alpha_2 sum_d f'_d P'_d, a scalar; the experts lie on `n_devices` devices in groups of E / D neighbours.

    f'_d = mean of f over the device's experts, P'_d = sum of P over them (eq. 16-17).
    """
    if n_devices < 1 or scores_TE.shape[-1] % n_devices:
        raise ValueError(f"{scores_TE.shape[-1]} experts do not divide among n_devices = {n_devices}")
    load_NE, score_NE = _load_and_score(scores_TE, experts_TK, n_sequences)
    load_ND = load_NE.unflatten(-1, (n_devices, -1)).mean(dim=-1)
    score_ND = score_NE.unflatten(-1, (n_devices, -1)).sum(dim=-1)
    return alpha * (load_ND * score_ND).sum(dim=-1).mean()


def balance_loss(routing: list[Routing], config: ModelConfig, *, batch_size: int) -> Tensor:
    """What training adds to the language loss: both losses over all layers, by the config's alphas.

    Sigmoid and sqrt-softplus scores are first normalised to sum 1 a token (DeepSeek-V3 report, eq. 17-20), logits of
    softmax_after_topk go through softmax.
    """
    n_sequences = batch_size if config.seq_aux else 1
    total = torch.zeros((), device=routing[0].scores_TE.device if routing else None)
    for layer in routing:
        scores_TE = _distribution(layer.scores_TE, config.scoring_func)
        if config.aux_loss_alpha:
            total = total + expert_balance_loss(
                scores_TE, layer.experts_TK, n_sequences=n_sequences, alpha=config.aux_loss_alpha
            )
        if config.device_loss_alpha:
            total = total + device_balance_loss(
                scores_TE,
                layer.experts_TK,
                n_sequences=n_sequences,
                n_devices=config.n_devices,
                alpha=config.device_loss_alpha,
            )
    return total


def _load_and_score(scores_TE: Tensor, experts_TK: Tensor, n_sequences: int) -> tuple[Tensor, Tensor]:
    """f and P of eq. (13) and (14), one row a sequence."""
    tokens, n_experts = scores_TE.shape
    if n_sequences < 1 or tokens % n_sequences:
        raise ValueError(f"{tokens} tokens do not divide into n_sequences = {n_sequences} sequences of equal length")
    if tokens == 0:
        return scores_TE.new_zeros(n_sequences, n_experts), scores_TE.new_zeros(n_sequences, n_experts)
    chosen_NC = experts_TK.reshape(n_sequences, -1)
    count_NE = scores_TE.new_zeros(n_sequences, n_experts)
    count_NE = count_NE.scatter_add(1, chosen_NC, torch.ones_like(chosen_NC, dtype=scores_TE.dtype))
    load_NE = count_NE * (n_experts / chosen_NC.shape[1])
    return load_NE, scores_TE.unflatten(0, (n_sequences, -1)).mean(dim=1)


def _distribution(scores_TE: Tensor, scoring_func: str) -> Tensor:
    """Scores as shares that sum to 1 a token; counted in float32 at least."""
    scores_TE = scores_TE.to(torch.promote_types(scores_TE.dtype, torch.float32))
    if scoring_func == "softmax":
        return scores_TE
    if scoring_func == "softmax_after_topk":
        return scores_TE.softmax(dim=-1)
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True)
