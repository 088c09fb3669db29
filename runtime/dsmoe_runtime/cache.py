"""Where what is made once for this user is kept between runs."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """The folder `name` in $DSMOE_CACHE_DIR, else `dsmoe/name` in $XDG_CACHE_HOME (~/.cache); it need not be there."""
    own = os.environ.get("DSMOE_CACHE_DIR")
    if own:
        return Path(own).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmoe" / name


def own_folder(name: str, lost: str) -> Path | None:
    """`cache_folder(name)`, made if need be, for what is run when it is found again.

    None, and a warning that ends with what is `lost`, if others than this user may write there or it cannot be made.
    """
    folder = cache_folder(name)
    try:
        others = writable_by_others(folder)
    except OSError as error:
        log.warning("%s cannot be used (%s): %s", folder, error.strerror, lost)
        return None
    if others:
        log.warning("%s, so %s; name a folder of your own with DSMOE_CACHE_DIR", others, lost)
        return None
    return folder


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
