"""A file or folder given as a source of weights, and a format's answer when it inspects it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from realsr_hpc.files import json_value
from realsr_hpc.formats.found import Found
from realsr_hpc.formats.pickles import read_pickle
from realsr_hpc.formats.tensor_files import safetensors_specs

Rotary = Literal["interleaved", "halves"]
PICKLED = (".pt", ".pth", ".ckpt", ".bin")


@dataclass
class Signs:
    """What spoke for a format, and what against it; it is recognised when nothing did."""

    support: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)

    def ask(self, present: bool, sign: str) -> Signs:
        """Note one sign: a file, or a key."""
        (self.support if present else self.against).append(sign)
        return self


@dataclass(frozen=True)
class Format:
    """One row of the table: how a format is known, and how it is opened."""

    name: str
    look: Callable[[Place], Signs]
    open: Callable[[Place, Rotary | None], Found]


@dataclass(frozen=True)
class Place:
    """A source. ValueError when it does not exist."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ValueError(f"source {self.path} does not exist")

    def file(self, *names: str) -> Path | None:
        """The first of some files (paths below the folder, wildcards allowed) that is there."""
        if not self.path.is_dir():
            return None
        return next((path for name in names for path in sorted(self.path.glob(name)) if path.is_file()), None)

    @functools.cached_property
    def content(self) -> Any:
        """Of a single file: specs by name, or what a pickle holds; None for a folder and for other kinds of files."""
        if not self.path.is_file():
            return None
        if self.path.suffix == ".safetensors":
            return safetensors_specs(self.path)
        return read_pickle(self.path) if self.path.suffix in PICKLED else None

    def keys(self, *under: str) -> set[str]:
        """Names in a single file, those under one of some keys where it has one."""
        content = self.content
        if not isinstance(content, dict):
            return set()
        inner = next((content[key] for key in under if isinstance(content.get(key), dict)), content)
        return {str(name) for name in inner}


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. ValueError names the file."""
    try:
        content = json_value(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} is missing; copy the folder again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return content
