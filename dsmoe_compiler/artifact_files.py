"""The files of an artifact: which there are, what the manifest keeps of them, and whether they are still so."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsmoe_compiler.targets.onnx.session import KERNELS
from dsmoe_compiler.targets.weights import WEIGHTS
from dsmoe_model.checkpoint.json_files import PLAIN_NAME
from dsmoe_runtime.errors import ArtifactError

MANIFEST, CONFIG = "manifest.json", "config.json"
RUN = (".pt2", ".onnx", ".so", ".o", ".safetensors")  # what is loaded if it is there


def check_files(folder: Path, files: dict[str, Any], *, check_weights: bool) -> None:
    """Every listed file is there, is a plain file in the folder, and has its size and hash; nothing else is loaded."""
    for name in (CONFIG, *(n for n in listed(folder) if n.endswith(RUN) or n.startswith(f"{KERNELS}/"))):
        if name not in files:
            raise ArtifactError(f"{folder} holds {name}, which its manifest does not list: it was altered")
    paths = {name: inside(folder, name) for name in files}
    hashed = {name: path for name, path in paths.items() if check_weights or not name.startswith(f"{WEIGHTS}/")}
    for name, path in paths.items():
        size, due = path.stat().st_size, files[name].get("bytes") if isinstance(files[name], dict) else None
        if size != due:
            said = f"has {size:,} bytes, its manifest says {due}"
            raise ArtifactError(f"{path} {said}: damaged or altered. Compile it again")
    with ThreadPoolExecutor(4) as pool:
        for name, digest in zip(hashed, pool.map(sha256, hashed.values()), strict=True):
            if digest != files[name].get("sha256"):
                said = "has not the hash that its manifest says"
                raise ArtifactError(f"{paths[name]} {said}: damaged or altered. Compile it again")


def inside(folder: Path, name: str) -> Path:
    """The path of a listed file: a plain name, at most one folder down, no link on the way. Raises: ArtifactError."""
    parts = name.split("/")
    if len(parts) > 3 or not all(PLAIN_NAME.fullmatch(part) for part in parts):
        raise ArtifactError(f"{folder} names the file {name[:200]!r}: only plain names inside the folder are accepted")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link: refused. Copy the file itself into the folder if you trust it")
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise ArtifactError(f"{path} is missing or not a regular file: the artifact is incomplete")
    return path


def listed(folder: Path) -> list[str]:
    """The files of an artifact, but for the manifest, by their names in it."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def describe(path: Path) -> dict[str, Any]:
    """What the manifest keeps of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
