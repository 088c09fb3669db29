"""Names on disk against parameters in memory: which tensor of a checkpoint fills which part of the model.

model.layers.3.mlp.gate.weight                  [E, H]       layers.3.mlp.router.weight
model.layers.3.mlp.experts.7.gate_proj.weight   [I, H]       layers.3.mlp.experts.gate_up_proj [7, :I]
model.layers.3.mlp.experts.7.up_proj.weight     [I, H]       layers.3.mlp.experts.gate_up_proj [7, I:]
model.layers.3.mlp.experts.7.down_proj.weight   [H, I]       layers.3.mlp.experts.down_proj    [7]
model.layers.3.mlp.experts.gate_up_proj         [E, 2I, H]   the same, already stacked (transformers in memory)
model.layers.3.mlp.shared_experts.up_proj.weight             layers.3.mlp.shared_experts.up_proj.weight
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from dsmoe_model.checkpoint.shards import DTYPES, TensorEntry
from dsmoe_model.config import ModelConfig
from dsmoe_model.errors import CheckpointError

_ROTARY = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # old LLaMA files store this constant


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the checkpoint and where it goes: a parameter, or one expert of it, or some rows of that."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The part of the model's tensor this slot stands for; always contiguous."""
        part = tensors[self.parameter]
        if self.expert is not None:
            part = part[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def model_slots(config: ModelConfig, names: Container[str] = ()) -> Iterator[Slot]:
    """Every tensor a checkpoint of this model must hold. `names`, those it does hold, settle prefix and packing.

    Lazy, since a hostile config may ask for a thousand million names.
    """
    prefix = "" if "embed_tokens.weight" in names else "model."
    vocabulary, hidden = config.vocab_size, config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield Slot(f"{prefix}embed_tokens.weight", (vocabulary, hidden), "embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        to = f"layers.{layer}"
        at = f"{prefix}{to}"
        yield Slot(f"{at}.input_layernorm.weight", (hidden,), f"{to}.input_layernorm.weight")
        for part, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield Slot(f"{at}.self_attn.{part}.weight", (width, hidden), f"{to}.self_attn.{part}.weight")
        yield Slot(f"{at}.self_attn.o_proj.weight", (hidden, queries), f"{to}.self_attn.o_proj.weight")
        yield Slot(f"{at}.post_attention_layernorm.weight", (hidden,), f"{to}.post_attention_layernorm.weight")
        if config.is_moe_layer(layer):
            yield from moe_slots(config, f"{at}.mlp.", f"{to}.mlp.", names)
        else:
            yield from _mlp_slots(f"{at}.mlp.", f"{to}.mlp.", hidden, config.intermediate_size)
    yield Slot(f"{prefix}norm.weight", (hidden,), "norm.weight")
    if not config.tie_word_embeddings:
        yield Slot("lm_head.weight", (vocabulary, hidden), "lm_head.weight")


def moe_slots(config: ModelConfig, at: str, to: str, names: Container[str] = ()) -> Iterator[Slot]:
    """The tensors of one mixture-of-experts block; `at` and `to` are its prefixes on disk and in memory."""
    experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    if experts and config.hash_routing:
        yield Slot(f"{at}gate.token_experts", (config.vocab_size, 1), f"{to}router.token_experts")
    elif experts:
        yield Slot(f"{at}gate.weight", (experts, hidden), f"{to}router.weight")
        if config.selection_bias:
            bias = "e_score_correction_bias"
            yield Slot(f"{at}gate.{bias}", (experts,), f"{to}router.{bias}")
    gate_up, down = f"{to}experts.gate_up_proj", f"{to}experts.down_proj"
    if f"{at}experts.gate_up_proj" in names:
        yield Slot(f"{at}experts.gate_up_proj", (experts, 2 * width, hidden), gate_up)
        yield Slot(f"{at}experts.down_proj", (experts, hidden, width), down)
    else:
        for expert in range(experts):
            name = f"{at}experts.{expert}"
            yield Slot(f"{name}.gate_proj.weight", (width, hidden), gate_up, expert, (0, width))
            yield Slot(f"{name}.up_proj.weight", (width, hidden), gate_up, expert, (width, 2 * width))
            yield Slot(f"{name}.down_proj.weight", (hidden, width), down, expert)
    if config.n_shared_experts:
        yield from _mlp_slots(f"{at}shared_experts.", f"{to}shared_experts.", hidden, config.shared_intermediate_size)


def _mlp_slots(at: str, to: str, hidden: int, width: int) -> Iterator[Slot]:
    for part, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        yield Slot(f"{at}{part}.weight", shape, f"{to}{part}.weight")


def match(
    slots: Iterator[Slot], entries: Mapping[str, TensorEntry], *, of: str, tied_head: bool = False
) -> list[tuple[Slot, TensorEntry]]:
    """Pair every slot with its tensor, in file order. Raises CheckpointError on any missing, extra or misshapen."""
    pairs: list[tuple[Slot, TensorEntry]] = []
    faults: list[str] = []
    for slot in slots:
        entry = entries.get(slot.name)
        if entry is None:
            faults.append(f"{slot.name} is missing")
        elif entry.shape != slot.shape:
            faults.append(f"{slot.name} has shape {list(entry.shape)}, the config asks for {list(slot.shape)}")
        elif entry.dtype not in DTYPES or (entry.dtype == "I64") != slot.name.endswith("token_experts"):
            faults.append(f"{slot.name} has dtype {entry.dtype}; read are BF16, F16, F32 and F64, not quantised")
        else:
            pairs.append((slot, entry))
        if len(faults) == 8:
            break
    else:
        wanted = {slot.name for slot, _ in pairs}
        constants = {"lm_head.weight"} if tied_head else set()
        extra = [
            name for name in entries if name not in wanted and name not in constants and not _ROTARY.fullmatch(name)
        ]
        if not faults:
            faults = [f"{name[:200]!r} is in the files but not in the model" for name in extra[:8]]
    if faults:
        raise CheckpointError(
            f"{of} does not fit its config.json: {'; '.join(faults)}. Nothing was loaded; check that config.json and "
            "the weights belong together."
        )
    return sorted(pairs, key=lambda pair: (pair[1].path, pair[1].offset))
