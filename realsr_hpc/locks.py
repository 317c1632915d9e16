"""File locks that are released when their holder ends, with a record of the holder.

`filelock` uses flock(2), which the system releases when the process ends for any reason. On shared file systems: NFS
(Linux, version 3 with lockd, or 4) makes the lock visible to all clients and releases that of a dead client after its
lease (90 s by default); Lustre needs the mount option `flock`; GPFS and CephFS support it. On a file system without
locks LockRefused is raised.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from realsr_hpc.files import read_json, writable_folder

POLL_S = 0.1


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    since: str
    what: str = ""
    """The purpose of the lock, or the job that holds it."""

    def __str__(self) -> str:
        """The holder for messages."""
        return f"process {self.pid} on {self.host} since {self.since}" + (f" ({self.what})" if self.what else "")


class LockRefused(ValueError):
    """Raised if another process holds the lock; `holder` names it, if known."""

    def __init__(self, message: str, holder: Holder | None = None) -> None:
        super().__init__(message)
        self.holder = holder


@contextmanager
def hold(path: Path, what: str = "", wait_s: float = 0.0) -> Generator[None, None, None]:
    """Hold the lock of the file `path` inside the block; waits up to `wait_s` for it. LockRefused names the holder.

    The file is not removed. A process cannot hold the same lock twice. Child processes do not inherit it.
    """
    lock = FileLock(path, mode=0o600, fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait_s, poll_interval=POLL_S)
    except Timeout:
        holder = holder_of(path)
        raise LockRefused(f"{path}: held by {holder or 'another process'}; wait for it, or end it", holder) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise LockRefused(
            f"{path}: this file system has no locks ({error.strerror}); use a folder on one that has them"
        ) from None
    try:
        _record_holder(path, what)
        yield
    finally:
        with suppress(OSError):
            _holder_file(path).unlink()
        lock.release()


@contextmanager
def sole_writer(folder: Path, field: str = "output", part: str = "") -> Generator[None, None, None]:
    """Create a folder for results and hold its lock, so that no other process writes there until the block ends.

    part: name of one part of a folder (`1-of-4`): several processes may write, one per part.

    Raises:
        ValueError: naming the field that gave the folder, if nothing can be written there.
        LockRefused: naming the process that writes there.
    """
    writable_folder(folder, field)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(folder / f".writing{part and '-'}{part}.lock", f"writing {folder}"))
        except LockRefused as error:
            if error.holder is None:
                raise
            message = f"{field}={folder}: {error.holder} writes there; wait for it, or name another"
            raise LockRefused(message, error.holder) from None
        yield


def holder_of(path: Path) -> Holder | None:
    """The recorded holder of a lock; None if there is no record."""
    return read_json(_holder_file(path), Holder)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    if not path.exists():
        return False
    try:
        with hold(path):
            return False
    except LockRefused:
        return True


def _record_holder(path: Path, what: str) -> None:
    """Record the holder; errors are ignored, because the lock also works on a full disk."""
    mine = Holder(os.uname().nodename, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), what)
    with suppress(OSError):
        _holder_file(path).write_text(json.dumps(asdict(mine)), encoding="utf-8")


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")
