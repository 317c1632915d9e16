"""Detects damaged weights without reading their tensors: files that are truncated, empty or of another kind.

Uses only the standard library and reads headers and small files, so that launching takes about a second and never
imports torch. The job itself checks that values are finite and tensors match the recipe.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import missing_shards, needs_of
from realsr_hpc.files import MIB, SUMS_FILE, json_object, safetensors_header, weight_map

LARGEST_JSON_BYTES = 64 * MIB
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
FOLDERS = ("model.weights", "model.lora.weights")
ENDINGS = (*WEIGHTS, ".npz", ".json", ".noun")


def damaged_files(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """Path and fault, with the recipe's field, of the files that a recipe names and that cannot be what it needs."""
    for need in needs_of(config):
        if need.weights_dir is None and (fault := _fault(need.purpose, need.path)):
            yield need.path, f"{need.purpose}: {fault}; from: {need.origin}"


def _fault(field: str, path: Path) -> str:
    if path.is_dir():
        return _folder_fault(path) if field in FOLDERS else f"{path} is a folder; name a file"
    try:
        if path.suffix not in ENDINGS and path.name != SUMS_FILE:
            return f"{path} is of no kind that is read there ({', '.join(f'*{ending}' for ending in ENDINGS)})"
        return _file_fault(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _folder_fault(folder: Path) -> str:
    patterns = ("*", "*/*", "*/*/*")  # as deep as Meta's tree
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not any(path.suffix in WEIGHTS for path in found):
        return f"{folder} holds no weights ({', '.join(f'*{ending}' for ending in WEIGHTS)})"
    direct = [path for path in found if path.parent == folder and path.suffix in (".json", *WEIGHTS)]
    try:
        return next(filter(None, map(_file_fault, direct)), "") or _index_fault(folder)
    except OSError as error:
        return f"{folder}: {error.filename} cannot be read ({error.strerror})"


def _file_fault(path: Path) -> str:
    if path.stat().st_size == 0:
        return f"{path} is empty; copy it again"
    if path.suffix == ".safetensors":
        return _safetensors_fault(path)
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        return f"{path} is cut or no npz file; copy it again"
    if path.suffix == ".json" and path.stat().st_size <= LARGEST_JSON_BYTES and json_object(path.read_bytes()) is None:
        return f"{path} is cut or no JSON object; copy it again"
    return ""


def _safetensors_fault(path: Path) -> str:
    """The header says how long the file is."""
    damaged = f"{path} is cut or no safetensors file; copy it again"
    header, start = safetensors_header(path)
    try:
        ends = [item["data_offsets"][1] for name, item in (header or {}).items() if name != "__metadata__"]
        whole = header is not None and start + max(ends, default=0) == path.stat().st_size
    except (KeyError, TypeError, IndexError):
        return damaged
    return "" if whole else damaged


def _index_fault(folder: Path) -> str:
    for index in sorted(folder.glob("*.index.json")):
        if weight_map(index) is None:
            return f"{index} is no index of weights; copy it again"
    shards = ", ".join(missing_shards(folder)[:3])
    return f"{folder}: its index names {shards}, not there; copy the missing shards" if shards else ""
