"""Named tensors in one or several files (safetensors or pickles, with or without an index), read one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from realsr_hpc.files import check_listed, checked_weight_map, other_content
from realsr_hpc.formats.found import Spec, finite
from realsr_hpc.formats.pickles import read_pickle

INDEXED = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Names of a Hugging Face folder's weights: index of several files, single file; in the order of preference."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFiles:
    """The tensors of several files by name; each file is opened once and stays memory-mapped."""

    def __init__(
        self, opened: Iterable[tuple[Path, Mapping[str, Tensor | Spec]]], stored: Mapping[str, str] | None = None
    ):
        """
        Args:
            opened: each file with its tensors or specs by name.
            stored: for tensors that the file stores under another name, that name.
        """
        self._stored = stored or {}
        self._places: dict[str, tuple[Path, Tensor | Spec]] = {}
        self.specs: dict[str, Spec] = {}
        for path, tensors in opened:
            for name, value in tensors.items():
                if name in self._places:
                    raise ValueError(f"{name} is in {self._places[name][0]} and in {path}; copy the folder again")
                self._places[name] = path, value
                self.specs[name] = value if isinstance(value, Spec) else Spec(tuple(value.shape), value.dtype)
        self._handles: dict[Path, safe_open] = {}

    def read(self, name: str) -> Tensor:
        """A tensor. ValueError, naming it, if it does not exist or holds NaN or infinities."""
        if name not in self._places:
            raise ValueError(f"there is no tensor {name} in the files")
        path, value = self._places[name]
        if isinstance(value, Spec):
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt")
            value = self._handles[path].get_tensor(self._stored.get(name, name))
            assert isinstance(value, Tensor), "opened for torch"
        if value.layout != torch.strided or value.dtype not in DTYPES.values():
            kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise ValueError(f"{path}: {name} is stored as {kind}; only {', '.join(DTYPES)} are weights that are read")
        return finite(name, value, path)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name][0]


def safetensors_specs(path: Path) -> dict[str, Spec]:
    """Shape and type of each tensor, from the file's header. ValueError if the file is damaged."""
    specs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                specs[name] = Spec(tuple(part.get_shape()), _dtype(part.get_dtype(), name, path))
    except (SafetensorError, OSError) as error:
        other = other_content(path) if path.is_file() else ""
        raise ValueError(f"{path} {other or f'is damaged ({error}); copy it again'}") from None
    return specs


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file, and its metadata.

    ValueError if the file is damaged, holds NaN or infinities, or differs from the `SHA256SUMS` beside it.
    """
    check_listed(path)
    tensors = TensorFiles([(path, safetensors_specs(path))])
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
    return {name: tensors.read(name) for name in tensors.specs}, notes


def _dtype(name: str, tensor: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{path}: {tensor} is stored as {name}; only {', '.join(DTYPES)} are weights that are read")
    return DTYPES[name]


def state_of(content: object, path: Path, under: tuple[str, ...] = ()) -> dict[str, Tensor | Spec]:
    """The tensors (or specs) of an opened file, at the top level or below one of the keys `under`, and nothing else.

    ValueError if there are none.
    """
    if isinstance(content, Mapping):
        content = next((content[key] for key in under if isinstance(content.get(key), Mapping)), content)
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(value, Tensor | Spec)}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors")
    return tensors


def open_folder(folder: Path) -> TensorFiles:
    """The weights of a Hugging Face folder. ValueError, naming the file, if a shard is missing or damaged."""
    for index, single in INDEXED:
        if (folder / index).is_file():
            return _indexed(folder, index)
        if (folder / single).is_file():
            return TensorFiles([(folder / single, open_file(folder / single))])
    names = [name for pair in INDEXED for name in pair]
    raise ValueError(f"{folder} has none of {', '.join(names)}; name a complete Hugging Face folder")


def open_file(path: Path) -> Mapping[str, Tensor | Spec]:
    """The specs of a safetensors file, or the memory-mapped tensors of a pickle."""
    return safetensors_specs(path) if path.suffix == ".safetensors" else state_of(read_pickle(path), path)


def _indexed(folder: Path, index: str) -> TensorFiles:
    places = checked_weight_map(folder / index)
    tensors = TensorFiles((folder / file, open_file(folder / file)) for file in sorted(set(places.values())))
    absent = sorted(set(places) - set(tensors.specs))
    if absent:
        raise ValueError(f"{folder / places[absent[0]]} lacks {absent[0]}, which {index} promises; copy it again")
    return tensors
