"""JSON from strangers: bounded in size and depth, no duplicate keys, never from outside the folder.

A checkpoint's `config.json` and indexes are read before anything else is believed, and read here only.
"""

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_model.errors import CheckpointError

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}")


def file_inside(folder: Path, name: str, *, said_by: str) -> Path:
    """The path of `name` in `folder`; it need not exist, but if it does it is a regular file that really lies there.

    `said_by` is who asked for the file, for the message. Links are followed and must end inside the folder, with one
    exception: a snapshot of the Hugging Face cache is made of links into the `blobs` folder of the same repository.
    Raises CheckpointError for everything else (`..`, absolute paths, URLs, NUL, links out, pipes and devices).
    """
    if not PLAIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"{said_by} names the file {name[:200]!r}: only a plain file name inside {str(folder)!r} is accepted "
            "(no folders, no '..', no absolute path, no URL). Do not load this checkpoint unless you know why."
        )
    path, root = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if real.parent not in (root, blobs):
        raise CheckpointError(
            f"{said_by} names the file {name!r}, which is a link to {str(real)!r}, outside the folder {str(root)!r}: "
            "refused. Copy the file itself into the folder if you trust it."
        )
    if real.exists() and not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{str(path)!r} is not a regular file: refused.")
    return path


def read_json(path: Path, *, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; the size is looked at before a byte is read."""
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(
            f"{str(path)!r} has {size:,} bytes; this kind of file may have {limit:,}: refused unread."
        )
    return parse_json(path.read_bytes(), where=str(path))


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """One JSON object (not a list, not a bare value); duplicate keys, NaN and absurd nesting are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where!r} has the key {twice[:200]!r} twice: refused, which one counts is a guess.")
        return found

    def no_constant(text: str) -> NoReturn:
        raise CheckpointError(f"{where!r} holds {text}, which is not JSON: refused.")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{where!r} is nested too deeply: refused.") from None
    except ValueError as error:
        raise CheckpointError(f"{where!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where!r} holds a JSON {type(value).__name__}; an object was expected.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented JSON, flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
