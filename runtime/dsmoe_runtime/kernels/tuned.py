"""Tables of tuned plans: JSON files, some in the package, the user's own in a cache folder.

    {"format": 1, "gpu": "NVIDIA H200", "multiprocessors": 132, "triton": "3.6", "made": {...},
     "plans": [{"dtype": "bfloat16", "hidden": 2048, "width": 1408, "experts": 64, "top_k": 6, "tokens": 1,
                "regime": "pairs", "up": [1, 4, 1024, 4, 1], "down": [1, 2, 2048, 4, 6], "us": 28.9, "default_us": 31}]}

A tile is [block_m, block_n, block_k, num_warps, num_stages]; what a plan leaves out has Plan's default, and "shared" is
given where shared experts were computed in the same launches. A table counts on its own kind of GPU and release of
Triton alone. The user's come before the package's, and a file that cannot be read is ignored with a warning that names
it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from dsmoe_runtime.cache import cache_folder
from dsmoe_runtime.kernels.gpu import Device
from dsmoe_runtime.kernels.plan import REGIMES, Plan, Shape, Tile

log = logging.getLogger(__name__)

FORMAT = 1
PACKAGED = Path(__file__).parent / "tables"
SIZES = ("hidden", "width", "experts", "top_k", "tokens")
HALVES = {"bfloat16": "float16", "float16": "bfloat16"}  # same bytes, same instructions
MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Entry:
    """A tuned plan, with its time and that of the model's choice in the same run."""

    shape: Shape
    plan: Plan
    us: float
    default_us: float


def user_table(device: Device, dtype: str) -> Path:
    """The file of this user for a GPU, a dtype and the release of Triton that is installed."""
    name = "".join(c if c.isalnum() else "-" for c in device.name.removeprefix("NVIDIA ").lower())
    return cache_folder("tuned") / f"{name}_{device.multiprocessors}_{dtype}_triton{triton_release()}.json"


@cache
def triton_release() -> str:
    """The installed Triton as "3.6": tiles that are good, or compile at all, change from release to release."""
    for package in ("triton", "pytorch-triton"):
        try:
            return ".".join(metadata.version(package).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return "none"


@lru_cache(maxsize=1024)
def plans(shape: Shape, device: Device) -> Mapping[int, Plan]:
    """Tuned plans of these sizes by their number of tokens (`shape.tokens` does not count); {} if there are none.

    Plans without shared experts stand in for those with them, and 16-bit dtypes for each other, after their own.
    """
    found: dict[int, Plan] = {}
    for shared, dtype in product(sorted({0, shape.shared}), (HALVES.get(shape.dtype), shape.dtype)):
        if dtype is None:
            continue
        wanted = replace(shape, tokens=0, dtype=dtype, shared=shared)
        own = user_table(device, dtype)
        for path in (*_packaged(), *([own] if own.is_file() else [])):
            for entry in _usable(path, device, _stamp(path)):
                if replace(entry.shape, tokens=0) == wanted:
                    found[entry.shape.tokens] = entry.plan
    return found


def store(entries: Iterable[Entry], device: Device, path: Path, made: Mapping[str, Any] | None = None) -> None:
    """Put entries into a table, in place of those of the same shapes; the file appears whole or not at all.

    A table at `path` of another GPU or release of Triton, or one that cannot be read, is replaced.
    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two that tune at a time would lose what the other found
        kept = {entry.shape: entry for entry in (_usable(path, device, _stamp(path)) if path.is_file() else ())}
        kept |= {entry.shape: entry for entry in entries}
        head = {
            "format": FORMAT, "gpu": device.name, "multiprocessors": device.multiprocessors,
            "triton": triton_release(), "made": dict(made or {}),
        }  # fmt: skip
        ordered = sorted(
            kept.values(), key=lambda e: (e.shape.dtype, *(getattr(e.shape, size) for size in (*SIZES, "shared")))
        )
        lines = ",\n".join("  " + json.dumps(_to_json(entry)) for entry in ordered)
        text = json.dumps(head, indent=1)[:-2] + f',\n "plans": [\n{lines}\n ]\n}}\n'
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    finally:
        os.close(folder)


def read(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """A table's head and its entries. Raises: ValueError or OSError; one plan that cannot be read spoils the file."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes are no table of ours")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else None
        raise ValueError(f"its format is {found!r}; this version reads {FORMAT}")
    listed = table.pop("plans", None)
    if not isinstance(listed, list):
        raise ValueError('"plans" is no list')
    return table, [_from_json(item, number) for number, item in enumerate(listed)]


def forget_tables() -> None:
    """Look for tables again at the next call."""
    plans.cache_clear()
    _packaged.cache_clear()


@cache
def _packaged() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGED.glob("*.json")))


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is replaced."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=64)
def _usable(path: Path, device: Device, stamp: tuple[int, int]) -> tuple[Entry, ...]:
    """The entries of a table made for this GPU and this Triton, () of any other; a file that cannot be read warns."""
    try:
        head, entries = read(path)
    except (OSError, ValueError) as error:
        log.warning("%s: ignored, no table of tuned plans: %s", path, error)
        return ()
    made_for = (head.get("gpu"), head.get("multiprocessors"), head.get("triton"))
    return tuple(entries) if made_for == (device.name, device.multiprocessors, triton_release()) else ()


def _to_json(entry: Entry) -> dict[str, Any]:
    plan = {f.name: getattr(entry.plan, f.name) for f in fields(Plan)}
    for name, value in plan.items():
        if isinstance(value, Tile):
            plan[name] = list(asdict(value).values())
    times = {"us": round(entry.us, 2), "default_us": round(entry.default_us, 2)}
    sizes = {size: getattr(entry.shape, size) for size in SIZES}
    shared = {"shared": entry.shape.shared} if entry.shape.shared else {}
    return {"dtype": entry.shape.dtype} | sizes | shared | plan | times


def _from_json(item: Any, number: int) -> Entry:
    """Raises: ValueError naming the plan by its number."""
    if not isinstance(item, dict):
        raise ValueError(f"plan {number} is no object")
    values, parts = dict(item), {f.name: f for f in fields(Plan)}
    try:
        sizes = {size: values.pop(size) for size in SIZES}
        if "shared" in values:
            sizes["shared"] = values.pop("shared")
        if any(type(value) is not int or value < 1 for value in sizes.values()):
            raise ValueError(f"plan {number}: sizes must be whole numbers from 1 on, not {sizes}")
        shape = Shape(**sizes, dtype=str(values.pop("dtype")))
        us, default_us = float(values.pop("us")), float(values.pop("default_us"))
        unknown = sorted(set(values) - set(parts))
        if unknown:
            raise ValueError(f"plan {number} has {', '.join(unknown)}, which this version does not know")
        for name in values:
            if isinstance(values[name], list):
                values[name] = _tile(values[name], number)
        if values["regime"] not in REGIMES:
            raise ValueError(f"plan {number}: regime is {values['regime']!r}")
        if not isinstance(values["up"], Tile) or not isinstance(values["down"], Tile):
            raise ValueError(f"plan {number}: up and down must be tiles")
        for name in set(values) - {"up", "down"}:
            default = parts[name].default
            if isinstance(default, bool | int | str) and type(values[name]) is not type(default):
                raise ValueError(f"plan {number}: {name} is {values[name]!r}")
        return Entry(shape, Plan(**values), us, default_us)
    except (KeyError, TypeError) as error:
        raise ValueError(f"plan {number} is incomplete: {error!r}") from None


def _tile(values: list[Any], number: int) -> Tile:
    count = sum(f.default is f.default_factory for f in fields(Tile))  # fields without a default
    if not count <= len(values) <= len(fields(Tile)) or any(type(value) is not int for value in values):
        raise ValueError(f"plan {number}: a tile is {len(fields(Tile))} whole numbers, not {values}")
    return Tile(*values)
