"""Writes a folder of weights under a temporary name and renames it when complete; reads such a folder with checks."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from realsr_hpc.files import as_other_files, checked_weight_map, publish, writable_folder
from realsr_hpc.locks import Holder, LockRefused, hold, holder_of, is_held

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 10**9
"""Largest size of a weights file. While a shard is written it is in memory twice, as tensors and as bytes."""


class Aside:
    """`with Aside(output) as folder:` gives a hidden sibling folder, which is renamed to `output` if nothing is raised.

    Raises ValueError if `output` exists or another process is writing it.
    """

    def __init__(self, output: Path):
        self.output = output
        self.folder = output.with_name(f".{output.name}.aside")
        self._stack = ExitStack()

    def __enter__(self) -> Path:
        refuse_existing(self.output)
        writable_folder(self.output.parent, "the folder of output")
        lock = _lock_of(self.output)
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(lock, f"writing {self.output}"))
            except LockRefused as error:
                raise error if error.holder is None else _taken(self.output, error.holder) from None
            stack.callback(lock.unlink, missing_ok=True)
            refuse_existing(self.output)  # written while we waited for the lock
            shutil.rmtree(self.folder, ignore_errors=True)  # left by a process that was killed
            self.folder.mkdir()
            self._stack = stack.pop_all()
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                publish(self.folder, self.output)
            else:
                shutil.rmtree(self.folder, ignore_errors=True)


def refuse_existing(output: Path) -> None:
    """Raise ValueError if the output folder exists. Called before hours of work, and again before writing."""
    if output.exists():
        raise ValueError(f"output={output} exists; name a new folder, or remove that one first")


def refuse_taken(output: Path) -> None:
    """As `refuse_existing`, also where another process is about to write it: told before the work, not after it."""
    refuse_existing(output)
    if is_held(_lock_of(output)):
        raise _taken(output, holder_of(_lock_of(output)))


def _lock_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _taken(output: Path, holder: Holder | None) -> LockRefused:
    return LockRefused(
        f"output={output}: {holder or 'another process'} writes it; wait for it, or name another", holder
    )


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write indented JSON; non-ASCII characters are not escaped."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or numbered shards with an index if the tensors exceed `shard_bytes`.

    tensors: names and values in the order of `sizes` (name -> bytes). They are consumed one by one, so that only one
    shard is in memory.
    """
    shards = list(_shards(sizes, shard_bytes))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    given = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        _save(folder / file, dict(itertools.islice(given, len(names))), names)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _save(path: Path, tensors: dict[str, Tensor], names: list[str]) -> None:
    assert list(tensors) == names, f"{path.name}: tensors {list(tensors)} come in another order than planned: {names}"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    as_other_files(path)


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if names and size + nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of an export folder. ValueError if it has no weights, a shard is missing or damaged."""
    index = folder / INDEX
    if index.is_file():
        places = {name: folder / file for name, file in checked_weight_map(index).items()}
        for path in set(places.values()):
            held = _names(path)
            absent = sorted(name for name, place in places.items() if place == path and name not in held)
            if absent:
                raise ValueError(f"{path} lacks {absent[0]}, which {INDEX} promises; copy the folder again")
        return places
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; name a Hugging Face folder of safetensors")
    return dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from None
