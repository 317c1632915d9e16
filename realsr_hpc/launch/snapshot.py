"""A copy of the code that a Slurm job runs from, so that editing the checkout changes no job in the queue.

Its name is the hash of its contents: runs of the same code share one copy, uncommitted changes included. It is
written aside and renamed, so a half-written one is never used. Files that git ignores (weights, data) stay where they
are; those the recipe names are linked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from realsr_hpc.config.load import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import code_root, is_checkout, project_root

FOLDERS = ("realsr_hpc", "recipes", "slurm", "tools")


def take_snapshot(configs: Sequence[RunConfig]) -> Path:
    """Folder of the copy that the runs of these recipes share, made if it does not exist yet."""
    files = _files()
    target = output_root(configs[0]) / "code" / _digest(files)
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        for name, source in files.items():
            copy = aside / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        try:
            os.rename(aside, target)
        except OSError:  # another launcher was faster
            shutil.rmtree(aside)
    for name in {name for config in configs for name in external_paths(config)}:
        _link(project_root() / name, target / name)
    return target


def external_paths(config: RunConfig) -> list[str]:
    """Relative paths that a recipe names."""
    tokenizers = (config.image_tokenizer.weights, config.text_tokenizer.path)
    named = (config.data.manifest, config.sft.traces, config.model.weights, *tokenizers)
    return [name for name in named if name and not Path(name).is_absolute()]


def code_version() -> dict[str, str]:
    """Commit and whether the tree differs from it, as tags; empty outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"mlflow.source.git.commit": commit.strip(), "realsr_hpc.uncommitted": str(bool(_git("status", "-s")))}


def environment() -> dict[str, Any]:
    """Python, machine, commit and the version of every installed package; no environment variable is in it."""
    packages = {found.metadata["Name"]: found.version for found in distributions()}
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "code": code_version() | {"branch": (_git("rev-parse", "--abbrev-ref", "HEAD") or "").strip()},
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _files() -> dict[str, Path]:
    """What is copied, by name in the snapshot: that of a wheel has the form of a checkout, recipes beside the code."""
    root = code_root()
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *FOLDERS)
    if listed:
        return {name: root / name for name in sorted(listed.split("\0")) if name and (root / name).is_file()}
    # Other people's packages lie beside a wheel's; its recipes are inside it, and move to where a checkout's are.
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


def _link(source: Path, target: Path) -> None:
    """Link what the snapshot lacks: a file's whole folder, as a manifest's photographs lie beside it, or it alone."""
    if target.exists() or not source.exists():
        return
    if source.is_file() and not target.parent.exists():
        source, target = source.parent, target.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another launcher was faster
        target.symlink_to(source)


def _git(*arguments: str) -> str | None:
    if not is_checkout():  # of a wheel, git would speak of whatever repository its environment lies in
        return None
    command = ["git", "-C", str(code_root()), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(answer.stdout) if answer.returncode == 0 else None
