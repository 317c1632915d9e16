"""Files that are whole or not there: written aside, flushed, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never stands before the bytes it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, final: Path) -> None:
    """Give a finished folder its name: everything in it is on disk before, the name itself when this returns."""
    for path in (*aside.rglob("*"), aside):
        flush(path)
    os.replace(aside, final)
    flush(final.parent)


def write_atomically(path: Path, text: str) -> None:
    """The old content or the new, never a part of it, whenever this process dies (not flushed: it may be the old)."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def writable_folder(path: Path, field: str) -> Path:
    """The folder, made where it is missing.

    Raises:
        ValueError: naming the field it was given in, where nothing can be written there.
    """
    probe = path / f".writable.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{field}={path} cannot be written ({error.strerror}); name a folder of yours") from None
    return path


def printable(text: object) -> str:
    """A path or message that any UTF-8 file or terminal takes: bytes of a name that are no UTF-8 as `\\xff`."""
    try:
        return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a character, which no file name holds
        return str(text).encode("utf-8", "backslashreplace").decode("utf-8")
