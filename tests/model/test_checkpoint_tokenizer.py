"""Text in, ids out, text back: the byte tokenizer against Python's own codec, and tokenizers read from a folder."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rules
from tokenizers import models, pre_tokenizers

from dsmoe_model.checkpoint import byte_tokenizer, load_tokenizer
from dsmoe_model.errors import CheckpointError

BYTES = byte_tokenizer()
LINE = "Grüße, 世界 🦀\n\t\0 <|bos|> <|eos|> \ufffd\u200b"


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == [256, *text.encode()]
    assert BYTES.decode(ids) == text


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_decode_as_python_does(data: bytes) -> None:
    assert BYTES.decode(list(data)) == data.decode("utf-8", errors="replace")


def test_special_and_padding_ids_give_nothing() -> None:
    assert BYTES.decode([256, 104, 258, 105, 259, 257]) == "hi"
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.vocab_size) == (256, 257, 258)
    assert BYTES.encode("") == [256]
    assert BYTES.decode([]) == ""


def test_saved_and_read_again(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    back = load_tokenizer(tmp_path)
    assert back is not None
    assert back.encode(LINE) == BYTES.encode(LINE) == [256, *LINE.encode()]
    assert back.decode(back.encode(LINE)) == LINE
    assert (back.bos_id, back.eos_id) == (256, 257)
    assert not back.has_chat_template


def word_tokenizer(folder: Path, settings: dict[str, object] | None) -> None:
    rules = Rules(models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2, "world": 3, "?": 4}, unk_token="?"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.add_special_tokens(["<s>", "</s>"])
    rules.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}])
def test_beginning_of_text_as_the_folder_says(bos: object, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, {"bos_token": bos, "eos_token": "</s>", "add_bos_token": True})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("hello world") == [0, 2, 3]
    assert tokenizer.encode("hello </s>") == [0, 2, 1]  # here special tokens in a text are the tokens
    assert tokenizer.decode([0, 2, 3, 1]) == "hello world"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_no_settings_no_special_tokens(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("hello world") == [2, 3]
    assert tokenizer.bos_id is None


def test_chat_template_is_seen_and_left_alone(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, {"chat_template": "{{ cycler.__init__.__globals__.os.system('touch owned') }}"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.has_chat_template
    assert tokenizer.encode("hello") == [2]


def test_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_broken_linked_and_huge_tokenizers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text in ("", "{}", "[" * 100_000, '{"model": {"type": "BPE"}}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="refused unread"):
        load_tokenizer(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="link to"):
        load_tokenizer(tmp_path)
