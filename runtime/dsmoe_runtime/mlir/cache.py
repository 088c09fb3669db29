"""Compiled kernels on disk, one object file each: per user, written atomically, keyed by all that decides the code.

An object becomes code of this process: a folder that others may write to is left alone, with one warning.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from dsmoe_runtime.cache import cache_folder, own_folder

HEADER = b"dsmoe object 1\n"


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returned for this key before, or now. A file that is cut short or altered is made anew."""
    folder = _folder(cache_folder("mlir"))
    if folder is None:
        return make()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.o"
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    digest = len(HEADER) + 32
    body = stored[digest:]
    if stored.startswith(HEADER) and hashlib.sha256(body).digest() == stored[len(HEADER) : digest]:
        return body
    body = make()
    _write(path, HEADER + hashlib.sha256(body).digest() + body)
    return body


@functools.cache
def _folder(path: Path) -> Path | None:
    return own_folder(path.name, "compiled kernels are not kept")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; a folder that cannot be written costs the next process its time, no more."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
