"""Where what is made once for this user is kept between runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` in $DSMOE_CACHE_DIR, else `dsmoe/name` in $XDG_CACHE_HOME (~/.cache); it need not be there."""
    own = os.environ.get("DSMOE_CACHE_DIR")
    if own:
        return Path(own).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmoe" / name


def writable_by_others(folder: Path) -> str | None:
    """Make the folder, and say who else than this user may write there, if anybody: what lies in it is run."""
    for checked in (folder.parent, folder):
        checked.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = checked.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return (
                f"{checked} belongs to user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}: others than you "
                f"(user {os.getuid()}) may write there"
            )
    return None
