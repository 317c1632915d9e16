"""Detects damaged weight files without reading their tensors: truncated, empty, or of another file type.

It reads only headers and small files and does not import torch, so that launching takes about a second. The job itself
checks that values are finite and that tensors match the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from realsr_hpc.config.adapters import refuse_other_function
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import Need, missing_shards, needs_of
from realsr_hpc.config.whole_files import PICKLES, file_fault
from realsr_hpc.files import SUMS_FILE, weight_map

WEIGHTS = (".safetensors", *PICKLES)
FOLDERS = ("model.weights", "model.lora.weights")
ENDINGS = (*WEIGHTS, ".npz", ".json", ".noun")


def damaged_files(config: RunConfig) -> Iterator[tuple[Path, str]]:
    """Yields path and message, which names the recipe's field, for each damaged or unsuitable file of a recipe."""
    for need, fault in faults_of(config).items():
        yield need.path, f"{need.purpose}: {fault}; from: {need.origin}"


def faults_of(config: RunConfig) -> dict[Need, str]:
    """The fault of each damaged file. Weights of pyiqa are not checked here; pyiqa's list of checksums covers them."""
    return {
        need: fault
        for need in needs_of(config)
        if need.weights_dir is None
        and (fault := _fault(need.purpose, need.path) or _other_adapters(config, need.purpose, need.path))
    }


def _other_adapters(config: RunConfig, field: str, folder: Path) -> str:
    """The fault of adapters whose configuration computes another function than the recipe's; empty if none."""
    if field != "model.lora.weights" or config.model.lora is None:
        return ""
    try:
        refuse_other_function(folder, config.model.lora)
        return ""
    except ValueError as error:
        return f"{folder}: {error}"


def _fault(field: str, path: Path) -> str:
    if path.is_dir():
        return _folder_fault(path) if field in FOLDERS else f"{path} is a folder; name a file"
    try:
        if path.suffix not in ENDINGS and path.name != SUMS_FILE:
            return f"{path} is not a kind of file that is read there ({', '.join(f'*{ending}' for ending in ENDINGS)})"
        return file_fault(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _folder_fault(folder: Path) -> str:
    patterns = ("*", "*/*", "*/*/*")  # Meta's folder of checkpoints has three levels
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not any(path.suffix in WEIGHTS for path in found):
        return f"{folder} holds no weights ({', '.join(f'*{ending}' for ending in WEIGHTS)})"
    direct = [path for path in found if path.parent == folder and path.suffix in (".json", *WEIGHTS)]
    try:
        return next(filter(None, map(file_fault, direct)), "") or _index_fault(folder)
    except OSError as error:
        return f"{folder}: {error.filename} cannot be read ({error.strerror})"


def _index_fault(folder: Path) -> str:
    for index in sorted(folder.glob("*.index.json")):
        if weight_map(index) is None:
            return f"{index} is not an index of weights; copy it again"
    shards = ", ".join(missing_shards(folder)[:3])
    return f"{folder}: its index names {shards}, not there; copy the missing shards" if shards else ""
