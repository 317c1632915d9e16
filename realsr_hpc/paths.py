"""Where the code, the recipes that come with it, and a user's relative paths lie.

From a checkout, or from a job's snapshot of one, all three are one folder. Installed as a wheel, the recipes lie inside
the package and a relative path starts from the current folder, where a user's own `recipes/` is found as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import realsr_hpc

PACKAGE = Path(realsr_hpc.__file__).resolve().parent
SAFE_PATH = "PYTHONSAFEPATH"
"""Set: Python does not look for modules in the current folder. As its -P, for processes that others start."""
CHECKOUT_VARIABLE = "REALSR_HPC_CHECKOUT"
"""In the environment of a job that runs from a snapshot of the code: the folder it was launched from."""


def code_root() -> Path:
    """The folder that contains `realsr_hpc/`; child processes need it in PYTHONPATH to run the same code."""
    return PACKAGE.parent


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS`, to be started with `python_path()`: it runs this very code from any folder.

    Without -P Python would look in the current folder first, which may be another checkout's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def python_path() -> str:
    """PYTHONPATH of a child process that runs this very code."""
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys([str(code_root()), *named]))


def is_checkout() -> bool:
    """Whether the code runs from a checkout or a snapshot, which hold `recipes/` beside the package; else a wheel."""
    return (PACKAGE.parent / "recipes").is_dir()


def project_root() -> Path:
    """The folder that relative paths start from: the checkout or snapshot; of an installed wheel, the current one."""
    return PACKAGE.parent if is_checkout() else Path.cwd()


def shipped_root() -> Path:
    """The folder that holds the `recipes/` and `slurm/` that come with the code."""
    return PACKAGE.parent if is_checkout() else PACKAGE


def recipe_folders() -> list[Path]:
    """Where recipes are looked for, the first match winning: $REALSR_HPC_RECIPES alone, or a user's own and ours."""
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
    """An absolute path as it is (`~` expanded), a relative one from the project root.

    A snapshot holds code and recipes; what else a recipe names (weights, data) a job finds where its launcher did, in
    the checkout it was launched from. What lies only among the files that come with the code (`recipes/assets/...`) is
    found there.
    """
    named = expanded(path)
    roots = [project_root(), *map(Path, filter(None, [os.environ.get(CHECKOUT_VARIABLE)])), shipped_root()]
    found = next((root / named for root in roots if (root / named).exists()), roots[0] / named)
    return found.resolve()
