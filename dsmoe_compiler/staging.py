"""Folders that appear whole or not at all: written beside their place, flushed, renamed.

A stage is a hidden folder, locked while its process lives; what a dead process has left, the next stage removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from dsmoe_runtime.errors import ArtifactError

MARK, OLD = ".dsmoe-part-", ".dsmoe-old-"


class Stage:
    """A hidden folder to write into. `near` is where it will be published; None: not known yet, a temporary place."""

    def __init__(self, near: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if near is None else Path(near).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        clean(parent)
        while True:
            self.path = parent / f".{near.name if near else 'artifact'}{MARK}{secrets.token_hex(4)}"
            self.path.mkdir(mode=0o700)
            lock = locked(self.path)
            if lock is not None:  # else another process cleaned it away just now
                break
        self._lock: int | None = lock
        self._forget = weakref.finalize(self, forget, self.path, os.getpid())

    def publish(self, target: Path, *, replaceable: Callable[[Path], bool]) -> Path:
        """Rename to `target`. A folder in its place is replaced if it is empty or `replaceable` says so.

        Raises: ArtifactError, if something else is there; the stage is kept then.
        """
        target = Path(target).absolute()
        check_place(target, replaceable)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.path.stat().st_dev != target.parent.stat().st_dev:
            moved = Stage(target)
            shutil.copytree(self.path, moved.path, dirs_exist_ok=True)
            self.discard()
            moved._forget.detach()
            self.path, self._lock = moved.path, moved._lock
            self._forget = weakref.finalize(self, forget, self.path, os.getpid())
        umask = os.umask(0)
        os.umask(umask)
        self.path.chmod(0o777 & ~umask)
        flush(self.path)
        if target.exists():
            swap(self.path, target)
        else:
            self.path.rename(target)
        flush_folder(target.parent)
        self._release()
        return target

    def discard(self) -> None:
        """Remove the folder, if it has not been published."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        self._forget.detach()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def forget(path: Path, owner: int) -> None:
    """Remove the stage of an object that was dropped unpublished, or whose process ends (but not a fork of it)."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def swap(new: Path, target: Path) -> None:
    """Put `new` in the place of the folder `target`, which is removed. Killed in between, `clean` puts it back."""
    hold = locked(target)  # `clean` in another process leaves it alone
    try:
        old = target.with_name(f".{target.name}{OLD}{secrets.token_hex(4)}")
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if hold is not None:
            os.close(hold)


def check_place(target: Path, replaceable: Callable[[Path], bool]) -> None:
    """Raise ArtifactError unless `target` is free, an empty folder, or one that may be replaced."""
    if target.is_symlink():
        raise ArtifactError(f"{target} is a link to {os.readlink(target)}: name the folder itself")
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} exists and is not a folder: give another name")
    if any(target.iterdir()) and not replaceable(target):
        raise ArtifactError(f"{target} holds files and is no artifact, so it is not replaced: give another name")


def clean(parent: Path) -> None:
    """Remove the stages of processes that are gone, and put back a folder whose replacement never came."""
    for path in parent.iterdir():
        mark = MARK if MARK in path.name else OLD
        if not path.name.startswith(".") or mark not in path.name or path.is_symlink() or not path.is_dir():
            continue
        if path.stat().st_uid != os.getuid():
            continue
        lock = locked(path)
        if lock is None:
            continue
        target = parent / path.name[1:].rpartition(mark)[0]
        if mark == OLD and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def locked(folder: Path) -> int | None:
    """A lock on a folder that ends with this process, or None if another holds it or it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            return None
        raise
    return handle


def flush(folder: Path) -> None:
    """Everything in `folder` to disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """The names in `folder` to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
