"""Reads a photograph's bytes from a file, or in place from a member of an uncompressed tar (WebDataset).

A member is written as a path, `shard-0000.tar#name.jpg@offset+size`, so manifests and loaders treat both alike. Reading
a photograph from a tar takes one seek.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_MEMBER = re.compile(r"(?P<tar>.+\.tar)#(?P<name>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A file inside a tar, with the position of its bytes."""

    tar: Path
    name: str
    offset: int
    size: int
    is_file: bool = True
    """False for a link or device, which has no bytes in the tar."""

    @property
    def path(self) -> Path:
        """The member as a path in a manifest."""
        return Path(f"{self.tar}#{self.name}@{self.offset}+{self.size}")


def tar_members(tar: Path) -> Iterator[Member]:
    """The files, links and devices of a tar, in order; only headers are read.

    Raises:
        ValueError: if it cannot be read as an uncompressed tar.
    """
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                if not info.isdir():
                    yield Member(tar, info.name, info.offset_data, info.size, info.isfile())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{tar} is not a plain tar ({error}); unpack or re-pack it without compression") from error


def open_bytes(path: Path) -> BinaryIO:
    """The photograph's bytes, readable and seekable.

    Raises:
        FileNotFoundError: if the file or its tar is missing.
        OSError: also for anything but a regular file: opening a pipe would block for ever.
    """
    member = _MEMBER.fullmatch(str(path))
    if not stat.S_ISREG(os.stat(member["tar"] if member else path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if member is None:
        return path.open("rb")
    with open(member["tar"], "rb") as tar:
        tar.seek(int(member["offset"]))
        return io.BytesIO(tar.read(int(member["size"])))


def relative_to(path: Path, folder: Path) -> str:
    """The path, or that of a tar's member, relative to a folder; a member's name stays as it is in the tar."""
    member = _MEMBER.fullmatch(str(path))
    file = Path(member["tar"]) if member else path
    seen = Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    return f"{seen}#{member['name']}@{member['offset']}+{member['size']}" if member else seen


def stamp(path: Path) -> str:
    """Text that changes when the file (or its tar) is written again: size and modification time."""
    member = _MEMBER.fullmatch(str(path))
    status = Path(member["tar"] if member else path).stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def photograph_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a photograph's bytes, which may be a member of a tar."""
    with open_bytes(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
