"""Streamed text: the same text as decoding everything at once, and no half characters on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.cli.stream import TextStream


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: list[int]) -> str:
    """As SentencePiece does: every token brings a blank, and the first one loses it."""
    return "".join(f" w{token}" for token in ids).removeprefix(" ")


def stream(ids: list[int], decode: object = decode_bytes) -> list[str]:
    pieces: list[str] = []
    text = TextStream(decode, pieces.append)  # type: ignore[arg-type]
    for token in ids:
        text.push(token)
    text.close()
    return pieces


@given(st.text())
def test_text_comes_out_as_it_is_and_in_whole_characters(text: str) -> None:
    pieces = stream(list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_come_out_as_when_decoded_at_once(data: bytes) -> None:
    assert "".join(stream(list(data))) == decode_bytes(list(data))


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_blanks_between_words_survive(length: int) -> None:
    ids = list(range(length))
    assert "".join(stream(ids, decode_words)) == decode_words(ids)


def test_each_piece_is_written_as_soon_as_it_is_certain() -> None:
    assert stream(list("aé€".encode())) == ["a", "é", "€"]
