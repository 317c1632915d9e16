"""A copy of the code that a Slurm job runs from, so that editing the checkout does not change queued jobs.

Its name is the hash of its contents, uncommitted changes included; runs of the same code share one copy. It is written
under another name and renamed when complete, so no job uses a partial copy. Launching compares every byte with the
checkout, and the job verifies SHA256SUMS. Files that git ignores (weights, data) stay in the checkout, where
`paths.resolve` finds them for the launcher and the job.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import SUMS_FILE, sha256_of
from realsr_hpc.launch.rundir import make_private
from realsr_hpc.locks import hold
from realsr_hpc.paths import code_root, is_checkout

WAIT_S = 120.0
FOLDERS = ("realsr_hpc", "recipes", "slurm", "tools")


def take_snapshot(configs: Sequence[RunConfig]) -> Path:
    """The snapshot folder that the runs of these recipes share; created if missing, replaced if its contents differ.

    ValueError if it, or the folder of all snapshots, belongs to another user.
    """
    files = _files()
    folder = make_private(output_root(configs[0]) / "code")
    target = folder / _digest(files)
    with hold(folder.with_name(".code.lock"), "taking a snapshot of the code", WAIT_S):
        if os.path.lexists(target) and not _is_whole(target, files):
            os.replace(target, aside_of(target, "damaged"))
        if not target.exists():
            os.replace(_copy(files, aside_of(target, "new")), target)
    return target


def aside_of(target: Path, word: str) -> Path:
    """A unique path in the snapshot's folder: host, process id and time are part of the name."""
    return target.with_name(f".{target.name}.{word}.{os.uname().nodename}.{os.getpid()}.{time.time_ns()}")


def _copy(files: dict[str, Path], aside: Path) -> Path:
    aside.mkdir(mode=0o700)
    for name, source in files.items():
        copy = aside / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)
        copy.chmod(copy.stat().st_mode & 0o755)
    (aside / SUMS_FILE).write_text("".join(f"{sha256_of(aside / name)}  {name}\n" for name in files), encoding="utf-8")
    for path in (aside / SUMS_FILE, *(path for path in aside.rglob("*") if path.is_dir())):
        path.chmod(path.stat().st_mode & 0o755)  # not writable for others, whatever the umask is
    return aside


def _is_whole(target: Path, files: dict[str, Path]) -> bool:
    """Whether no file is missing, changed or added (`__pycache__` aside), and no other user can change one.

    ValueError if it belongs to another user.
    """
    if target.is_symlink() or not target.is_dir():
        return False
    try:
        paths = list(make_private(target).rglob("*"))
        if any(path.is_symlink() or path.stat().st_uid != os.getuid() for path in paths):
            return False
        ours = [path for path in paths if "__pycache__" not in path.parts]
        present = {path.relative_to(target).as_posix() for path in ours if not path.is_dir()}
        if present != {*files, SUMS_FILE}:
            return False
        if _modes_hold(target, files, ours) or not _keeps_modes(target.parent):
            return _digest({name: target / name for name in files}) == target.name and _sums_hold(target, files)
        return False
    except OSError:
        return False  # a file that cannot be read


def _modes_hold(target: Path, files: dict[str, Path], ours: Sequence[Path]) -> bool:
    """Whether no other user can write, and executable files are still executable."""
    return not any(_mode(path) & 0o022 for path in ours) and all(
        _mode(target / name) == _mode(source) & 0o755 for name, source in files.items()
    )


def _keeps_modes(folder: Path) -> bool:
    """Whether chmod takes effect on its file system; SMB and FAT mounts show the same mode for every file."""
    probe = aside_of(folder / "modes", "probe")
    probe.touch()
    try:
        for mode in (0o600, 0o755):
            probe.chmod(mode)
            if _mode(probe) != mode:
                return False
    except PermissionError:
        return False
    finally:
        probe.unlink()
    return True


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _sums_hold(target: Path, files: dict[str, Path]) -> bool:
    listed = "".join(f"{sha256_of(target / name)}  {name}\n" for name in files)
    return (target / SUMS_FILE).read_bytes() == listed.encode()


def code_version() -> dict[str, str]:
    """MLflow tags with the git commit and whether there are uncommitted changes; empty outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"mlflow.source.git.commit": commit.strip(), "realsr_hpc.uncommitted": str(bool(_git("status", "-s")))}


def environment() -> dict[str, str | dict[str, str]]:
    """Python, machine, commit and the version of every installed package. Environment variables are left out."""
    packages = {found.metadata["Name"]: found.version for found in distributions()}
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "code": code_version() | {"branch": (_git("rev-parse", "--abbrev-ref", "HEAD") or "").strip()},
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _files() -> dict[str, Path]:
    """The files to copy, by path inside the snapshot; that of an installed wheel is laid out like a checkout."""
    root = code_root()
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *FOLDERS)
    if listed:
        return {name: root / name for name in sorted(listed.split("\0")) if name and (root / name).is_file()}
    # Beside an installed wheel lie other packages, so only ours is copied. Its recipes are inside the package and move
    # up to where a checkout has them.
    folders, moved = (FOLDERS, ()) if is_checkout() else (FOLDERS[:1], tuple(f"realsr_hpc/{name}/" for name in FOLDERS))
    found = (path for folder in folders for path in (root / folder).rglob("*"))
    names = {path.relative_to(root).as_posix(): path for path in found if path.is_file()}
    return {
        name.removeprefix("realsr_hpc/") if name.startswith(moved) else name: path
        for name, path in sorted(names.items())
        if "__pycache__" not in path.parts
    }


def _digest(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, source in files.items():
        digest.update(name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    if not is_checkout():  # for a wheel, git would describe whatever repository the environment happens to be in
        return None
    command = ["git", "-C", str(code_root()), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(answer.stdout) if answer.returncode == 0 else None
