"""Nothing that comes from elsewhere runs: pickles are read with weights_only, by an allow-list, or not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from realsr_hpc.paths import project_root

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


RESTRICTED = "realsr_hpc/checkpoint/pickles.py"
"""Where the one unpickler lives that knows an allow-list (tests/unit/checkpoint/test_pickles.py)."""


def trusting(path: Path) -> Iterator[str]:
    """Lines that would run what they read."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if names & PICKLES:
                yield f"{path}:{node.lineno} imports {names & PICKLES}"
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unchecked = ast.unparse(node.func) == "torch.load" and given.get("weights_only") != "True"
            if unchecked or given.get("allow_pickle", "False") != "False":
                yield f"{path}:{node.lineno} {ast.unparse(node)}"


def test_no_pickle_is_trusted(tmp_path: Path) -> None:
    (wrong := tmp_path / "wrong.py").write_text("import torch, pickle\ntorch.load('x')\n")
    assert len(list(trusting(wrong))) == 2
    files = [path for folder in ("realsr_hpc", "tools") for path in (project_root() / folder).rglob("*.py")]
    found = [path.relative_to(project_root()).as_posix() for path in files for _ in trusting(path)]
    assert found == [RESTRICTED]
