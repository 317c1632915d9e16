"""The file or folder given as a source of weights, and the interface of a format: how to recognise and open it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realsr_hpc.files import Json, json_value, other_content
from realsr_hpc.formats.found import Found
from realsr_hpc.formats.pickles import read_pickle
from realsr_hpc.formats.tensor_files import safetensors_specs

Rotary = Literal["interleaved", "halves"]
PICKLED = (".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class Signs:
    """The signs of a format (files, keys) that a source has and lacks. It is recognised if none is absent."""

    support: tuple[str, ...] = ()
    """Signs that are present."""
    against: tuple[str, ...] = ()
    """Signs that are absent."""

    def add(self, present: bool, sign: str) -> Signs:
        """These signs and one more, present or absent."""
        return self.joined(Signs((sign,), ()) if present else Signs((), (sign,)))

    def add_keys(self, present: Collection[str], *keys: str) -> Signs:
        """These signs and one for each key, present if it is in `present`."""
        there, absent = (tuple(key for key in keys if (key in present) is wanted) for wanted in (True, False))
        return self.joined(Signs(there, absent))

    def joined(self, other: Signs) -> Signs:
        """Both sets of signs."""
        return Signs(self.support + other.support, self.against + other.against)


@dataclass(frozen=True)
class Format:
    """One format: its name, how to recognise it (`recognise`), and how to open it."""

    name: str
    recognise: Callable[[Place], Signs]
    open: Callable[[Place, Rotary | None], Found]


@dataclass(frozen=True)
class Place:
    """A file or folder of weights. ValueError if it does not exist."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ValueError(f"source {self.path} does not exist")

    def file(self, *names: str) -> Path | None:
        """The first of these files that exists, as paths below the folder; wildcards are allowed."""
        if not self.path.is_dir():
            return None
        return next((path for name in names for path in sorted(self.path.glob(name)) if path.is_file()), None)

    @functools.cached_property
    def content(self) -> object:
        """Content of a single file: tensor specs by name (safetensors) or the unpickled object; else None."""
        if not self.path.is_file():
            return None
        if self.path.suffix == ".safetensors":
            return safetensors_specs(self.path)
        return read_pickle(self.path) if self.path.suffix in PICKLED else None

    def keys(self, *under: str) -> set[str]:
        """Tensor names in a single file; if it holds one of the keys `under`, the names below that key."""
        content = self.content
        if not isinstance(content, dict):
            return set()
        inner = next((content[key] for key in under if isinstance(content.get(key), dict)), content)
        return {str(name) for name in inner}


def read_json(path: Path) -> dict[str, Json]:
    """The object in a JSON file. ValueError, naming the file, if it is missing or holds anything else."""
    try:
        content = json_value(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} is missing; copy the folder again") from None
    except ValueError as error:
        raise ValueError(f"{path} {other_content(path) or f'is not JSON ({error}); copy it again'}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return content
