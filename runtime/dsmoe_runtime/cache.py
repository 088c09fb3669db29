"""Where what is made once for this user is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` in $DSMOE_CACHE_DIR, else `dsmoe/name` in $XDG_CACHE_HOME (~/.cache); it need not be there."""
    own = os.environ.get("DSMOE_CACHE_DIR")
    if own:
        return Path(own).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmoe" / name
