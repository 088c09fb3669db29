"""A folder of entries on disk, each a folder of files with their hashes: per user, whole or not there, bounded in size.

    $DSMOE_CACHE_DIR/compiled/KEY/entry.json     what the entry says of itself, and the hash of each file beside it
                                  prefill.o ...

What lies here is loaded and run, so a folder that others can write to is not used. A damaged entry is named, removed
and made anew. `DSMOE_COMPILE_CACHE=0` turns all of it off, a number of megabytes bounds it (1024).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsmoe_model.checkpoint.json_files import PLAIN_NAME
from dsmoe_runtime.cache import own_folder

log = logging.getLogger(__name__)
ENTRY = "entry.json"
SWITCH, DEFAULT_MEGABYTES = "DSMOE_COMPILE_CACHE", 1024


class Damaged(Exception):
    """An entry that cannot be used; the text names the file."""


def limit() -> int:
    """Bytes that entries may take in all; 0: no cache."""
    asked = os.environ.get(SWITCH, "").strip()
    if not asked:
        return DEFAULT_MEGABYTES << 20
    if not asked.isdecimal():
        log.warning("%s is %r, neither 0 nor a number of megabytes: nothing is cached", SWITCH, asked)
        return 0
    return int(asked) << 20


def folder() -> Path | None:
    """Where entries are, made if need be; None, and a warning, if others than this user may write there."""
    return own_folder("compiled", "nothing compiled is taken from it or kept in it")


def read(key: str, into: Path) -> dict[str, Any] | None:
    """Copy the files of an entry and return what it says; None without one. A damaged one is named and removed."""
    root = folder()
    if root is None or not (root / key).is_dir():
        return None
    try:
        said, files = _checked(root / key)
    except Damaged as error:
        log.warning("%s: the entry is removed, and the model compiled anew", error)
        remove(key)
        return None
    os.utime(root / key)
    for name, content in files.items():
        (into / name).parent.mkdir(exist_ok=True)
        (into / name).write_bytes(content)
    return said


def remove(key: str) -> None:
    """Forget an entry."""
    root = folder()
    if root is not None:
        shutil.rmtree(root / key, ignore_errors=True)


def write(key: str, said: dict[str, Any], files: Iterable[str], source: Path) -> None:
    """Keep `files` of the folder `source` and what is said of them; a full disk costs the next process its time."""
    root = folder()
    if root is None:
        return
    made = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
    try:
        digests = {}
        for name in files:
            content = (source / name).read_bytes()
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        text = json.dumps({"said": said, "files": digests})
        digest = hashlib.sha256(text.encode()).hexdigest()
        (made / ENTRY).write_text(f"{digest}\n{text}", encoding="utf-8")
        if not (root / key).exists():
            made.rename(root / key)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next compile of this model takes as long", root, error.strerror)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    evict(root)


def evict(root: Path) -> None:
    """Remove what was used longest ago until the rest is within the limit."""
    entries = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
        if total > limit():
            shutil.rmtree(entry, ignore_errors=True)


def _checked(entry: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What an entry says, and its files: all of them have the hashes that they should."""
    digest, _, text = _content(entry / ENTRY).decode(errors="replace").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise Damaged(f"{entry / ENTRY} is cut short or altered")
    whole, files = json.loads(text), {}
    for name, wanted in whole["files"].items():
        if not all(PLAIN_NAME.fullmatch(part) for part in name.split("/")):
            raise Damaged(f"{entry / ENTRY} names the file {name[:80]!r}")
        content = _content(entry / name)
        if hashlib.sha256(content).hexdigest() != wanted:
            raise Damaged(f"{entry / name} is cut short or altered")
        files[name] = content
    return whole["said"], files


def _content(path: Path) -> bytes:
    if path.is_symlink():
        raise Damaged(f"{path} is a link")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from None
