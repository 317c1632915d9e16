"""The walks of docs/architecture.md name functions that exist, and state their hops and climbs."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from realsr_hpc.paths import project_root

ROOT = project_root()
PAGE = (ROOT / "docs" / "architecture.md").read_text()
WALKS = re.findall(
    r"^\*\*(.+?)\*\* \((\d+) hops, (\d+|no) climbs?\)\..*?```text\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE
)
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
FLOOR = {room: number for number, layer in enumerate(LAYERS) for room in re.findall(r"\w+", layer)}
"""Of each room, 0 the highest."""


def steps(tree: str) -> list[tuple[int, str, str, bool]]:
    """Depth, file, name and mark of each line."""
    found = re.findall(r"^( *)(\S+\.py): ([\w.]+)(.*)$", tree, re.MULTILINE)
    assert len(found) == len(tree.splitlines()), tree
    return [(len(indent) // 2, file, name, "↑" in rest) for indent, file, name, rest in found]


def defined(file: str) -> set[str]:
    """Functions and classes of a module, and methods as `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / "realsr_hpc" / file).read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {
                node.name,
                *(f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)),
            }
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def floor(file: str) -> int:
    return FLOOR[file.split("/")[0].removesuffix(".py")]


@pytest.mark.parametrize(("walk", "hops", "climbs", "tree"), WALKS, ids=[walk[0] for walk in WALKS])
def test_a_walk_leads_through_functions_that_exist_and_counts_its_hops(walk, hops, climbs, tree):
    callers: list[str] = []
    counted, climbed = 0, 0
    for depth, file, name, marked in steps(tree):
        assert name in defined(file), f"{file} has no {name}"
        del callers[depth:]
        if callers and callers[-1] != file:
            counted += 1
            climbs_here = floor(file) < floor(callers[-1])
            assert marked == climbs_here, f"{callers[-1]} -> {file}: {name}"
            climbed += climbs_here
        callers.append(file)
    assert (counted, climbed) == (int(hops), 0 if climbs == "no" else int(climbs)), walk


def test_there_are_four_walks():
    assert len(WALKS) == 4
