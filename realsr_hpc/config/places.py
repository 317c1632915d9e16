"""The folder of a recipe's runs, and paths below it, which stay valid if it is moved or copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import Json
from realsr_hpc.paths import expanded, project_root

ROOT = "{output_root}/"
"""Replaces the output root in paths that must not depend on its location."""


def output_root(config: RunConfig) -> Path:
    """Absolute folder of all runs of this recipe's owner."""
    return (project_root() / expanded(config.output_root)).resolve()


def text_without_root(text: str, root: Path) -> str:
    """A text with `ROOT` in place of `root`, so that moving the folder does not change a run."""
    return text.replace(f"{root}/", ROOT)


def without_root(tree: Json, root: Path) -> Json:
    """A plain tree with `text_without_root` of all its texts."""
    return _each(tree, lambda text: text_without_root(text, root))


def moved_below(tree: Json, before: Path, now: Path) -> Json:
    """A plain tree in which paths below `before` that no longer exist are replaced by paths below `now`."""

    def moved(text: str) -> str:
        path = Path(text)
        gone = path.is_relative_to(before) and not os.path.exists(path)
        return str(now / path.relative_to(before)) if gone else text

    return _each(tree, moved)


def _each(tree: Json, change: Callable[[str], str]) -> Json:
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_each(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
