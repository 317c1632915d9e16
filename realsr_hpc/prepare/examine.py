"""The two passes over the photographs of a source: decode and hash each, and describe those without captions or tags.

Both keep a journal below `output/.prepare`, so that a killed preparation continues and shards share their results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.samples import MIN_PHOTOGRAPH_PX
from realsr_hpc.data.storage import photograph_sha256, stamp
from realsr_hpc.files import printable
from realsr_hpc.prepare.duplicates import difference_hash
from realsr_hpc.prepare.journal import Journal
from realsr_hpc.prepare.scan import Item

_DESCRIBED_AT_ONCE = 8
Shard = tuple[int, int]
"""(k, n), k from 1: every n-th photograph, beginning with the k-th."""


@dataclass(frozen=True)
class Examined:
    """What decoding a photograph found; a line of the journal `examined.jsonl`, without its empty fields."""

    fault: str = ""
    """Why the photograph cannot be used, the kind of fault first; the other fields are then empty."""
    width: int = 0
    """In px, after the rotation that the file asks for; so is `height`."""
    height: int = 0
    sha256: str = ""
    look: str = ""
    """`difference_hash` as 16 hexadecimal digits."""


def examine_all(
    items: Sequence[Item],
    output: Path,
    shard: Shard | None,
    num_threads: int,
    on_photograph: Callable[[int, int], None],
) -> tuple[dict[str, Examined], int]:
    """Examine each photograph; returns the results by name, and how many of them the journal already had.

    on_photograph: called with the number examined so far and the total.
    """
    journal = Journal(output / ".prepare", "examined", shard)
    known = {item.name: _from_journal(journal.get(item.name, _stamp(item))) for item in items}
    results = {name: examined for name, examined in known.items() if examined is not None}
    todo = [item for item in items if item.name not in results]
    reused = len(results)
    on_photograph(reused, len(items))
    # Threads suffice: decoding and hashing release the interpreter lock.
    with ThreadPoolExecutor(num_threads) as pool:
        for item, examined in zip(todo, pool.map(_examine, todo), strict=True):
            journal.add(item.name, _stamp(item), {name: value for name, value in asdict(examined).items() if value})
            results[item.name] = examined
            on_photograph(len(results), len(items))
    journal.close()
    return results, reused


def _from_journal(row: Mapping[str, object] | None) -> Examined | None:
    """The result in a line of the journal; None if there is no line or it is damaged."""
    if row is None:
        return None
    fault, width, height, digest, look = (row.get(name) for name in ("fault", "width", "height", "sha256", "look"))
    if isinstance(fault, str):
        return Examined(fault)
    if not (isinstance(width, int) and isinstance(height, int) and isinstance(digest, str) and isinstance(look, str)):
        return None
    whole = width > 0 and height > 0 and all(re.fullmatch("[0-9a-f]+", text) for text in (digest, look))
    return Examined("", width, height, digest, look) if whole else None


def _examine(item: Item) -> Examined:
    try:
        image = decode_image(item.path)
        if min(image.shape[:2]) < MIN_PHOTOGRAPH_PX:
            raise BrokenImage(
                f"small: {image.shape[1]}x{image.shape[0]} px, at least {MIN_PHOTOGRAPH_PX} px are needed"
            )
        if item.lq_path is not None:
            decode_image(item.lq_path)
        digest = photograph_sha256(item.path)
    except (BrokenImage, OSError) as error:
        return Examined(str(error) if isinstance(error, BrokenImage) else f"broken: {error}")
    return Examined("", image.shape[1], image.shape[0], digest, f"{difference_hash(image):016x}")


def _stamp(item: Item) -> str:
    """Identifies the files of a photograph and its partner, so that a new partner has it examined again."""
    partner = "" if item.lq_path is None else f"+{printable(item.lq_path.name)}-{_file_stamp(item.lq_path)}"
    return _file_stamp(item.path) + partner


def _file_stamp(path: Path) -> str:
    try:
        return stamp(path)
    except (OSError, ValueError):  # ValueError: a note names a path that no file can have
        return "missing"


def describe_items(
    items: Sequence[Item],
    output: Path,
    kind: str,
    model: Callable[[list[UInt8[np.ndarray, "H W 3"]]], Sequence[Sequence[str]]],
    shard: Shard | None,
) -> Iterable[tuple[str, list[str]]]:
    """Yields name and texts of each photograph: from the journal named `kind`, else from the model, in batches.

    A photograph that can no longer be read since it was examined is left out; training will skip and name it.
    """
    journal = Journal(output / ".prepare", kind, shard)
    todo = []
    for item in items:
        row = journal.get(item.name, _stamp(item))
        texts = row.get("texts") if row else None
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            yield item.name, texts
        else:
            todo.append(item)
    for start in range(0, len(todo), _DESCRIBED_AT_ONCE):
        batch = [
            (item, image) for item in todo[start : start + _DESCRIBED_AT_ONCE] if (image := _decoded(item)) is not None
        ]
        for (item, _), texts in zip(batch, model([image for _, image in batch]) if batch else [], strict=True):
            journal.add(item.name, _stamp(item), {"texts": list(texts)})
            yield item.name, list(texts)
    journal.close()


def _decoded(item: Item) -> UInt8[np.ndarray, "H W 3"] | None:
    try:
        return decode_image(item.path)
    except BrokenImage:
        return None
