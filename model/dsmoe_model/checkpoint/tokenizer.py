"""Text to token ids and back, through the `tokenizers` library; and a byte tokenizer that needs no file at all.

`tokenizer.json` has the rules; `tokenizer_config.json` says which token begins a text and whether it is put there. A
chat template in it is a program from a stranger: it is never executed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Rules

from dsmoe_model.checkpoint.json_files import file_inside, read_json, write_json
from dsmoe_model.errors import CheckpointError

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_LIMIT, SETTINGS_LIMIT = 128 * 2**20, 4 * 2**20  # bytes


@dataclass(frozen=True)
class Tokenizer:
    """`encode` and `decode`; `bos_id` and `eos_id` are None where the files name no such token."""

    rules: Rules
    settings: dict[str, Any]
    bos_id: int | None
    eos_id: int | None
    has_chat_template: bool = False

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the beginning-of-text token in front if the tokenizer's files ask for it."""
        add_bos = self.settings.get("add_bos_token")
        if add_bos is None:  # then tokenizer.json's own template decides
            return list(self.rules.encode(text).ids)
        ids = list(self.rules.encode(text, add_special_tokens=False).ids)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special and unknown ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        return str(self.rules.decode(list(ids), skip_special_tokens=True))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, which a model's embedding must cover."""
        return max(self.rules.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`; `load_tokenizer` gives the same tokenizer back."""
        (folder / TOKENIZER).write_text(self.rules.to_str(pretty=False), encoding="utf-8")
        write_json(folder / SETTINGS, self.settings)


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has no `tokenizer.json`. Raises CheckpointError."""
    folder = Path(folder)
    path = file_inside(folder, TOKENIZER, said_by=f"{str(folder)!r}")
    if not path.exists():
        return None
    if path.stat().st_size > TOKENIZER_LIMIT:
        raise CheckpointError(
            f"{str(path)!r} has {path.stat().st_size:,} bytes, more than {TOKENIZER_LIMIT:,}: refused unread."
        )
    try:
        rules = Rules.from_buffer(path.read_bytes())
    except Exception as error:  # `tokenizers` raises bare Exception
        raise CheckpointError(f"{str(path)!r} is not a tokenizer: {error}") from None
    settings_path = file_inside(folder, SETTINGS, said_by=f"{str(folder)!r}")
    settings = read_json(settings_path, limit=SETTINGS_LIMIT) if settings_path.exists() else {}
    template = settings.get("chat_template") is not None or (folder / TEMPLATE).exists()
    return _with_settings(rules, settings, has_chat_template=template)


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, ids 0 to 255, then bos 256 and eos 257; any text comes back as it went in."""
    alphabet = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    rules = Rules(models.BPE(vocab=alphabet, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules.decoder = decoders.ByteLevel()
    rules.add_special_tokens([AddedToken("<|bos|>", special=True), AddedToken("<|eos|>", special=True)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "add_bos_token": True,
        "split_special_tokens": True,  # "<|bos|>" in a text is seven bytes, not the token
        "clean_up_tokenization_spaces": False,
    }
    return _with_settings(rules, settings, has_chat_template=False)


def _with_settings(rules: Rules, settings: dict[str, Any], *, has_chat_template: bool) -> Tokenizer:
    rules.encode_special_tokens = settings.get("split_special_tokens") is True
    ids: list[int | None] = []
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token  # older files spell an AddedToken out
        ids.append(rules.token_to_id(content) if isinstance(content, str) else None)
    return Tokenizer(rules, settings, ids[0], ids[1], has_chat_template)


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2): itself if printable, else from U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
