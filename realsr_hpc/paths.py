"""Where relative paths in recipes start from."""

from __future__ import annotations

from pathlib import Path

import realsr_hpc


def project_root() -> Path:
    """The folder that holds `realsr_hpc/` and `recipes/`: of a job, its snapshot of the code."""
    return Path(realsr_hpc.__file__).resolve().parent.parent


def resolve(path: str | Path) -> Path:
    """An absolute path as it is (`~` expanded), a relative one from the project root."""
    return (project_root() / Path(path).expanduser()).resolve()
