"""Token ids become text as they come; a character is written once all of its bytes are there."""

from __future__ import annotations

from collections.abc import Callable

INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes token by token. `decode` takes a list of ids, `write` the text that has become certain.

    A tokenizer may decode a token differently after another one (SentencePiece drops the first blank, a byte-level
    one splits a character over tokens), so each step decodes a window that starts one written piece earlier and
    writes what is new in it.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self.decode = decode
        self.write = write
        self.ids: list[int] = []
        self.window = 0  # the first id of the window
        self.written = 0  # ids whose text has been written

    def push(self, token: int) -> None:
        """Add one id; writes nothing while the text ends within a character."""
        self.ids.append(token)
        text = self.decode(self.ids[self.window :])
        if not text.endswith(INCOMPLETE):
            self._write(text)

    def close(self) -> None:
        """Write what is left, an incomplete character at the end as it is."""
        self._write(self.decode(self.ids[self.window :]))

    def _write(self, text: str) -> None:
        before = self.decode(self.ids[self.window : self.written])
        if len(text) > len(before):
            self.write(text[len(before) :])
        self.window, self.written = self.written, len(self.ids)
