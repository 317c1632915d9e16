"""Writes files atomically: under a temporary name, flushed to disk, then renamed. Text is UTF-8 in every locale.

A small file can still be empty or garbled, after a power failure, a truncated copy or an edit. So small files are read
with `read_json`, which logs a damaged file once and treats it as missing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | Mapping[str, Json]"
"""A decoded JSON or YAML document, or a part of one. `isinstance` tells which before anything is done with it."""
logger = logging.getLogger(__name__)
_warned: set[tuple[Path, str]] = set()

MIB, GIB = 2**20, 2**30
ASIDE_BYTES = 120
"""Bytes of a file's name that its temporary name keeps: with host, process and thread it must fit in 255."""
SUMS_FILE = "SHA256SUMS"
LARGEST_HEADER_BYTES = 100 * MIB
"""Largest header of a safetensors file, the library's own limit."""


def flush(path: Path) -> None:
    """Flush a file or folder to disk, so that a later rename never becomes visible before its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_other_files(path: Path) -> None:
    """Give a file the default permissions (umask), because safetensors makes it readable by its owner only."""
    # the umask can only be read by setting it; files that other threads create meanwhile stay private
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def other_content(path: Path) -> str:
    """Description of a file that was downloaded in place of the wanted one: a Git LFS pointer or a web page; "": no."""
    with path.open("rb") as stream:
        head = stream.read(512).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file; download it again, after logging in if its owner requires that"
    return ""


def publish(aside: Path, final: Path) -> None:
    """Rename a finished folder: its content is on disk before, the new name when this returns."""
    for path in (*aside.rglob("*"), aside):
        flush(path)
    os.replace(aside, final)
    flush(final.parent)


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path to write to, which is renamed to `path` when the block ends.

    `path` always has either the old or the new content, even if this process or the machine dies; after the block it
    has the new one. The temporary file is removed if the block raises. OSError if `path` is a device or pipe.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # the rename would replace a device or pipe
        raise OSError(errno.EINVAL, "not a regular file, so it is not replaced", str(path))
    # Another host on the same file system may have our process id; the name itself may be as long as the limit.
    beginning = os.fsdecode(os.fsencode(path.name)[:ASIDE_BYTES])
    aside = path.with_name(f".{beginning}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield aside
        if aside.is_file():
            as_other_files(aside)
        flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file, as `replacing` does; bytes of file names that are not UTF-8 are preserved."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="surrogateescape")


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted. Linked folders are included, each once; broken links are not.

    A folder below it that cannot be read is logged and skipped; OSError if the folder itself cannot be read.
    """
    os.scandir(folder).close()
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_log_unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()  # a link to a folder that was already listed
            continue
        entered.add(real)
        folders.sort()
        found += [Path(place) / name for name in names if os.path.isfile(os.path.join(place, name))]
    return sorted(found)


def _log_unreadable(error: OSError) -> None:
    logger.warning("%s: skipped (%s)", printable(error.filename), error.strerror)


def replace_link(link: Path, target: Path | str) -> None:
    """Make a symbolic link, or point an existing one elsewhere, in one step: a reader never finds none."""
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_value(content: str | bytes) -> Json:
    """The value of a JSON document. Only ValueError is raised for an invalid one, also if it is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(content: bytes) -> dict[str, Json] | None:
    """A JSON object with any keys; None if the content is not one."""
    try:
        found = json_value(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def safetensors_header(path: Path) -> tuple[dict[str, Json] | None, int]:
    """The header of a safetensors file, by tensor name, and the offset of the data; None if truncated or invalid.

    Does not use the safetensors library, because launching avoids importing vendors.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(LARGEST_HEADER_BYTES, path.stat().st_size - 8):
            return None, 0
        return json_object(stream.read(length)), 8 + length


@dataclass(frozen=True)
class _WeightIndex:
    """`*.index.json` of Hugging Face, as far as it is read."""

    weight_map: dict[str, str]


def weight_map(index: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index of sharded weights; None if the file is not such an index."""
    try:
        return parse_json(index.read_bytes(), _WeightIndex).weight_map
    except ValueError:
        return None


def checked_weight_map(index: Path) -> dict[str, str]:
    """Like `weight_map`; ValueError if it is not an index, names files outside its folder, or a shard is missing."""
    places = weight_map(index)
    if places is None:
        raise ValueError(f"{index} is not an index of weights; copy it again")
    if any(Path(file).name != file for file in places.values()):
        raise ValueError(f"{index} names files outside of its folder; copy it again")
    missing = sorted({file for file in places.values() if not (index.parent / file).is_file()})
    if missing:
        raise ValueError(f"{index.parent}: {index.name} names {', '.join(missing)}, not there; copy the missing shards")
    return places


def writable_folder(path: Path, field: str) -> Path:
    """Return the folder, after creating it if it is missing.

    Raises:
        ValueError: naming the field that gave the folder, if nothing can be written there.
    """
    probe = path / f".writable.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{field}={path} cannot be written ({error.strerror}); name a folder that you can write to"
        ) from None
    return path


def printable(text: object) -> str:
    """A path or message as valid UTF-8: bytes of a file name that are not UTF-8 become escapes like `\\xff`."""
    try:
        return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file name contains
        return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: Exception) -> str:
    """The first non-blank line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_sums(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Write `SHA256SUMS` of the files directly in a folder, in the format of `sha256sum`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in {SUMS_FILE, *leave_out})
    (folder / SUMS_FILE).write_text("".join(f"{sha256_of(path)}  {path.name}\n" for path in files), encoding="utf-8")


def check_sums(folder: Path, largest_bytes: float = math.inf) -> None:
    """Compare a folder's files with its `SHA256SUMS`; without one nothing is checked.

    largest_bytes: of larger files only the existence is checked.

    Raises:
        ValueError: naming the first file that is missing or differs.
    """
    for line in _listed(folder):
        row = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if row is None:
            raise ValueError(f"{folder / SUMS_FILE} is damaged; copy the folder again")
        path = folder / row[2]
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {SUMS_FILE} lists; copy the folder again")
        if path.stat().st_size <= largest_bytes:
            _compare(path, row[1])


def check_listed(path: Path, largest_bytes: float = math.inf) -> None:
    """Compare one file of limited size with the `SHA256SUMS` beside it, if that lists it. ValueError if it differs."""
    for line in _listed(path.parent):
        digest, _, name = line.partition("  ")
        if name == path.name and path.stat().st_size <= largest_bytes:
            _compare(path, digest)


def _listed(folder: Path) -> list[str]:
    listing = folder / SUMS_FILE
    try:
        lines = listing.read_bytes().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(
            f"{listing} cannot be read ({error.strerror}); copy the folder again, or remove it to go without"
        ) from None
    if not lines:
        raise ValueError(f"{listing} is empty; copy the folder again, or remove it to go without")
    return lines


def _compare(path: Path, digest: str) -> None:
    if sha256_of(path) != digest:
        raise ValueError(f"{path} is damaged: it differs from {SUMS_FILE}; copy it again")


def checksum_of(path: Path) -> Path:
    """Path of `NAME.sha256` beside a file, which has its checksum in the format of `sha256sum`."""
    return path.with_name(f"{path.name}.sha256")


@contextmanager
def with_checksum(path: Path) -> Generator[Path, None, None]:
    """Like `replacing`, but also writes `NAME.sha256`. If the process is killed in between, there is no checksum."""
    checksum_of(path).unlink(missing_ok=True)
    with replacing(path) as aside:
        yield aside
        digest = sha256_of(aside)
    write_atomically(checksum_of(path), f"{digest}  {path.name}\n")


def checksum_fault(path: Path) -> str | None:
    """Why a file differs from its `NAME.sha256`; None if it does not, or there is no such file."""
    listing = checksum_of(path)
    try:
        words = listing.read_bytes().split()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{listing} cannot be read ({error.strerror}); copy it again, or remove it to go without"
    if not words or re.fullmatch(rb"[0-9a-f]{64}", words[0]) is None:
        return f"{listing} is damaged; copy it again, or remove it to go without"
    if sha256_of(path).encode() != words[0]:
        return (
            f"{path} differs from {listing.name}; copy it again, or remove {listing.name} if it was changed on purpose"
        )
    return None


def read_json(path: Path, kind: type[T]) -> T | None:
    """The content of a small JSON file, validated as `kind` (a dataclass, `dict[str, int]`, ...; unknown keys pass).

    None if it is missing; also if it is empty, truncated, garbled, of another kind or unreadable, which is logged once.
    """
    try:
        return parse_json(path.read_bytes(), kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(path, str(error.strerror))
    except ValueError as error:
        _warn_once(path, str(error))
    return None


def parse_json(content: bytes, kind: type[T]) -> T:
    """Validate a JSON document in memory as `kind`. ValueError, of one line, if it is not."""
    if not content.strip(b"\0 \t\r\n"):
        raise ValueError("it is empty")
    try:
        return adapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else str(first["msg"])) from None


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """Pydantic's validator of a type, created once per type."""
    return cast("TypeAdapter[T]", _adapter(kind))  # `cache` forgets the type that belongs to an argument


@cache
def _adapter(kind: type[object]) -> TypeAdapter[object]:
    return TypeAdapter(kind)


def _warn_once(path: Path, what: str) -> None:
    if (path, what) not in _warned:
        _warned.add((path, what))
        logger.warning("%s is damaged (%s): treated as missing", path, what)
