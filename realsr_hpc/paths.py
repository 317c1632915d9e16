"""Finds the code, the recipes that ship with it, and the folder that relative paths start from.

In a checkout, or a job's snapshot of one, all three are in one folder. In an installed wheel the recipes are inside the
package, and relative paths start from the current folder, where a user's own `recipes/` is found too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import realsr_hpc

PACKAGE = Path(realsr_hpc.__file__).resolve().parent
SAFE_PATH = "PYTHONSAFEPATH"
"""If set, Python does not search the current folder for modules; like its -P, for processes started by others."""
CHECKOUT_VARIABLE = "REALSR_HPC_CHECKOUT"
"""Environment variable of a job that runs from a snapshot of the code: the checkout it was launched from."""


def code_root() -> Path:
    """The folder that contains `realsr_hpc/`; child processes need it in PYTHONPATH to run the same code."""
    return PACKAGE.parent


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS`, to be started with `python_path()`: it runs this code from any folder.

    Without -P Python would search the current folder first, which may be another checkout.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def python_path() -> str:
    """PYTHONPATH with which a child process runs this code."""
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys([str(code_root()), *named]))


def is_checkout() -> bool:
    """Whether the code runs from a checkout or snapshot, which has `recipes/` next to the package; else a wheel."""
    return (PACKAGE.parent / "recipes").is_dir()


def project_root() -> Path:
    """The folder that relative paths start from: the checkout or snapshot; for an installed wheel the current one."""
    return PACKAGE.parent if is_checkout() else Path.cwd()


def shipped_root() -> Path:
    """The folder with the `recipes/` and `slurm/` that ship with the code."""
    return PACKAGE.parent if is_checkout() else PACKAGE


def recipe_folders() -> list[Path]:
    """Folders searched for recipes, in order: only $REALSR_HPC_RECIPES if set, else the user's own and the shipped."""
    if named := os.environ.get("REALSR_HPC_RECIPES"):
        return [Path(named).resolve()]
    folders = [project_root() / "recipes", shipped_root() / "recipes"]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` filled in. ValueError: there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: this machine has no such user; give the full path") from None


def resolve(path: str | Path) -> Path:
    """An absolute path, with `~` expanded; a relative path starts from the first root in which it exists.

    The roots are the project root, the checkout that a job was launched from (its snapshot has only code and recipes,
    not weights and data), and the files that ship with the code (`recipes/assets/...`).
    """
    named = expanded(path)
    roots = [project_root(), *map(Path, filter(None, [os.environ.get(CHECKOUT_VARIABLE)])), shipped_root()]
    found = next((root / named for root in roots if (root / named).exists()), roots[0] / named)
    return found.resolve()
