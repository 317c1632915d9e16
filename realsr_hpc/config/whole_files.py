"""Checks whether a file is complete and of the kind that its suffix says, without reading its content.

Launching and staging use it: only the beginning and the end of a file are read.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from realsr_hpc.files import MIB, adapter, json_object, other_content, safetensors_header

LARGEST_JSON_BYTES = 64 * MIB
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def file_fault(path: Path) -> str:
    """The fault of an existing file: empty, truncated, or not what its suffix says; "": none found.

    Also finds Git LFS pointers and login pages saved in place of weights. OSError if the file cannot be read.
    """
    if path.stat().st_size == 0:
        return f"{path} is empty; copy it again"
    if other := other_content(path):
        return f"{path} {other}"
    if path.suffix == ".safetensors":
        return "" if _whole_safetensors(path) else f"{path} is truncated or not a safetensors file; copy it again"
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        return f"{path} is truncated or not an npz file; copy it again"
    if path.suffix == ".json" and path.stat().st_size <= LARGEST_JSON_BYTES and json_object(path.read_bytes()) is None:
        return f"{path} is truncated or not a JSON object; copy it again"
    if path.suffix in PICKLES and not _whole_pickle(path):
        return f"{path} is truncated or not a file of torch.save; copy it again"
    return ""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors header, as far as it is read."""

    data_offsets: tuple[int, int]
    """Its first byte and the one after its last, counted from the end of the header."""


def _whole_safetensors(path: Path) -> bool:
    """Whether the file has the length that its header states."""
    header, start = safetensors_header(path)
    if header is None:
        return False
    listed = {name: item for name, item in header.items() if name != "__metadata__"}
    try:
        tensors = adapter(dict[str, _Stored]).validate_python(listed)
    except ValidationError:
        return False
    return start + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0) == path.stat().st_size


def _whole_pickle(path: Path) -> bool:
    """Whether it is a zip archive, whose directory is at the end, or begins like a plain pickle (before torch 1.6).

    The end of a plain pickle cannot be checked.
    """
    with path.open("rb") as stream:
        return zipfile.is_zipfile(path) or stream.read(1) == b"\x80"
