"""Ends what a run started: compile workers and the C++ compilers below them outlive a signal sent to us alone.

Linux tells a process's children in /proc; elsewhere only multiprocessing's own are known.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

GRACE_SECONDS = 3.0


def stop_children() -> None:
    """Interrupt every descendant of this process, then kill those that have not left after `GRACE_SECONDS`."""
    pids = descendants(os.getpid())
    pids += [child.pid for child in multiprocessing.active_children() if child.pid and child.pid not in pids]
    _signal(pids, signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    _signal([pid for pid in pids if _runs(pid)], signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, children before grandchildren; multiprocessing's resource tracker is left to leave
    by itself: it removes what the others forgot, and ends when we do."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop(0)
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(child) for child in task.read_text().split()]
                found += [child for child in children if not _is_tracker(child)]
                waiting += children
    return found


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _runs(pid: int) -> bool:
    """Whether `pid` still runs; a zombie, which only waits for its parent to look, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
