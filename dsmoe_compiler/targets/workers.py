"""Forked workers: one function each, progress lines and errors sent back, nothing left behind.

A fork shares the parent's weights page by page and needs no serialisation. What makes it safe here: the child runs
torch with one thread (an OpenMP pool does not survive a fork), collects no garbage (a collection would touch, and so
copy, the pages), and is a process group of its own that dies with its parent, compilers included.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Progress = Callable[[str], None]
Job = Callable[[Progress], Any]

PR_SET_PDEATHSIG = 1
GRACE = 5.0  # seconds between asking a worker to stop and ending it


def can_fork() -> bool:
    """Whether workers are available: on Linux, before this process has used a GPU (CUDA does not survive a fork)."""
    return sys.platform == "linux" and not torch.cuda.is_initialized()


class WorkerError(RuntimeError):
    """A worker failed; the text is its own."""


class Workers:
    """Runs jobs side by side: `start` each, then `results`. Leaving the `with` block ends whatever still runs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.running: dict[Connection, tuple[str, Any]] = {}
        self.done: dict[str, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for _, process in self.running.values():
            stop(process)
        self.running.clear()

    def start(self, name: str, job: Job) -> None:
        """Fork a worker for `job`, a function of a progress callback; its result must be small: it travels by pipe."""
        receive, send = multiprocessing.Pipe(duplex=False)
        parent = os.getpid()
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(send, job, parent), name=f"dsmoe {name}"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        process.start()
        send.close()
        self.running[receive] = (name, process)

    def results(self, names: Iterable[str]) -> dict[str, Any]:
        """Wait for those workers: name -> result. Raises: WorkerError with the words of the first worker to fail."""
        wanted = list(names)
        while not set(wanted) <= set(self.done):
            self.hear(timeout=None)
        return {name: self.done[name] for name in wanted}

    def hear(self, *, timeout: float | None) -> None:
        """Pass on what workers have said, waiting `timeout` seconds for the first word. Raises as `results`."""
        while ready := wait(list(self.running), timeout):
            for connection in ready:
                assert isinstance(connection, Connection)
                self._read(connection)
            timeout = 0.0

    def _read(self, connection: Connection) -> None:
        name, process = self.running[connection]
        try:
            kind, value = connection.recv()
        except EOFError:
            kind, value = "died", None
        if kind == "progress":
            self.progress(f"{name}: {value}")
            return
        process.join(GRACE)
        if kind != "done":
            raise WorkerError(f"{name} failed: {value if kind == 'error' else how_it_ended(process.exitcode)}")
        del self.running[connection]
        self.done[name] = value


def _work(send: Connection, job: Job, parent: int) -> None:
    """The child's life. Its own process group, so that `stop` reaches the compilers that it started."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()
    torch.set_num_threads(1)
    try:
        result = job(lambda message: send.send(("progress", message)))
        send.send(("done", result))
    except BaseException as error:
        text = "".join(traceback.format_exception(error)) if os.environ.get("DSMOE_DEBUG") else describe(error)
        send.send(("error", text))
    finally:
        send.close()
        os._exit(0)


def describe(error: BaseException) -> str:
    """One error in its own words, without the traceback."""
    return f"{type(error).__name__}: {error}"


def how_it_ended(exitcode: int | None) -> str:
    """Words for a worker that said nothing more; a kill is most often the kernel's, for want of memory."""
    if exitcode == -signal.SIGKILL:
        return "it was killed (out of memory?)"
    return f"it ended with exit code {exitcode}"


def stop(process: Any) -> None:
    """End a worker and everything it started."""
    for kill in (signal.SIGTERM, signal.SIGKILL):
        if process.pid is not None and process.is_alive():
            try:
                os.killpg(process.pid, kill)
            except ProcessLookupError:
                process.terminate()  # it has not made its group yet
        process.join(GRACE)
        if not process.is_alive():
            return
