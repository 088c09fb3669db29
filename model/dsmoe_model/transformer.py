"""The language model: embedding, pre-norm blocks of attention and (mixture-of-experts) feed-forward, norm, head.

Letters: B batch, S positions, T = B*S tokens, H model width, V vocabulary, K experts per token, C cache capacity.
Module names follow the official checkpoint, but for `mlp.router` (there `mlp.gate`) and the experts, stacked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsmoe_model.attention import Attention, KVCache, Place
from dsmoe_model.config import ModelConfig
from dsmoe_model.mlp import MLP
from dsmoe_model.moe import MoE
from dsmoe_model.norm import RMSNorm
from dsmoe_model.rope import rotary_table
from dsmoe_model.router import HashRouter, Router, Routing


class ModelOutput(NamedTuple):
    """Logits in float32 at least, and one routing per layer with routed experts."""

    logits_BSV: Tensor
    routing: list[Routing]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the feed-forward is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | MLP = MoE(config) if config.is_moe_layer(layer) else MLP(config, config.intermediate_size)

    def forward(
        self,
        x_BSH: Tensor,
        where: Place,
        ids_BS: Tensor,
        slots: tuple[Tensor, Tensor] | None,
        experts_TK: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), where, slots)
        normed = self.post_attention_layernorm(x_BSH)
        if isinstance(self.mlp, MLP):
            return x_BSH + self.mlp(normed), None
        y_BSH, routing = self.mlp(normed, ids_BS, experts_TK)
        return x_BSH + y_BSH, routing


class Transformer(nn.Module):
    """A decoder-only model after `config`. Its parameters are undefined until `init_weights` or a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)  # given, so that none is drawn only to be replaced
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def forward(
        self,
        ids_BS: Tensor,
        cache: KVCache | None = None,
        position: Tensor | None = None,
        *,
        last_only: bool = False,
        experts: list[Tensor] | None = None,
    ) -> ModelOutput:
        """Next-token logits for `ids_BS` (int64).

        cache None                 plain causal attention over the S tokens.
        cache, position None       prefill: the same, and keys and values go to the cache's slots 0..S-1.
        cache, position [1] int64  decode: S = 1 token at that position, attending over the cache up to it.

        `last_only` computes the logits of the last position alone, [B, 1, V] ([B, 0, V] when S = 0). `experts`, one
        `[T, K]` int64 per layer with routed experts, forces the choice of experts; their weights still come from this
        model's scores, so that two models' values can be compared with routing fixed.
        """
        if position is not None and (cache is None or position.shape != (1,) or ids_BS.shape[1] != 1):
            raise ValueError(
                "decoding takes a cache, ids [B, 1] and a position of shape [1]; got "
                f"cache {'None' if cache is None else 'given'}, ids {list(ids_BS.shape)}, "
                f"position {list(position.shape)}"
            )
        x_BSH = self.embed_tokens(ids_BS)
        where = self.place(x_BSH, cache, position)
        routing: list[Routing] = []
        for index, layer in enumerate(self.layers):
            slots = None if cache is None else (cache.key[index], cache.value[index])
            forced = None if experts is None or len(routing) == len(experts) else experts[len(routing)]
            x_BSH, routed = layer(x_BSH, where, ids_BS, slots, forced)
            if routed is not None:
                routing.append(routed)
        if experts is not None and len(experts) != len(routing):
            raise ValueError(f"experts forces {len(experts)} layers, the model has {len(routing)} with routed experts")
        if last_only:
            x_BSH = x_BSH[:, -1:]
        logits_BSV = self.lm_head(self.norm(x_BSH))
        return ModelOutput(logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32)), routing)

    def place(self, x_BSH: Tensor, cache: KVCache | None, position: Tensor | None) -> Place:
        """Where these tokens stand: 0..S-1, or at `position` with everything up to it in sight."""
        if cache is None or position is None:
            position_S, mask_SC = torch.arange(x_BSH.shape[1], device=x_BSH.device), None
        else:
            position_S = position
            mask_SC = torch.arange(cache.capacity, device=x_BSH.device)[None, :] <= position[:, None]
        cos_SD, sin_SD = rotary_table(position_S, self.config.head_dim, self.config.rope_theta, x_BSH.dtype)
        return Place(position_S, cos_SD, sin_SD, mask_SC)

    def tie(self) -> None:
        """One parameter for embedding and head, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        """`to_empty` and moves from the meta device make new parameters, one a module: tie them again."""
        super()._apply(fn, recurse)
        self.tie()
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every tensor in place: norms 1, the rest normal(0, initializer_range), selection biases 0.

        Each tensor draws from its own generator, so its values depend on the seed, its place and its shape alone.
        """
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(device=parameter.device).manual_seed((seed * 1_000_003 + index) % 2**63)
            parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        for index, module in enumerate(self.modules()):
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()
            if isinstance(module, HashRouter):
                table = module.token_experts
                generator = torch.Generator(device=table.device).manual_seed((seed * 1_000_003 + index) % 2**63)
                order = torch.randperm(table.shape[0], generator=generator, device=table.device)
                table.copy_(order[:, None] % self.config.n_routed_experts)


def build(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Transformer:
    """An initialised model in eval mode, allocated once, in `dtype` on `device`; on "meta" nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model = model.eval()
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    model.init_weights(seed)
    return model
