"""The folder of a recipe's runs, and paths below it, which stay valid if it is moved or copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import expanded, project_root

ROOT = "{output_root}/"
"""Replaces the output root in paths that must not depend on its location."""


def output_root(config: RunConfig) -> Path:
    """Absolute folder of all runs of this recipe's owner."""
    return (project_root() / expanded(config.output_root)).resolve()


def without_root(tree: Any, root: Path) -> Any:
    """A plain tree with `ROOT` in place of `root` in its texts, so that moving the folder does not change a run."""
    return _each(tree, lambda text: text.replace(f"{root}/", ROOT))


def moved_below(tree: Any, before: Path, now: Path) -> Any:
    """A plain tree in which paths below `before` that no longer exist are replaced by paths below `now`."""

    def moved(text: str) -> str:
        path = Path(text)
        gone = path.is_relative_to(before) and not os.path.exists(path)
        return str(now / path.relative_to(before)) if gone else text

    return _each(tree, moved)


def _each(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_each(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
