"""`Any` switches the type checker off, so it stands only where a library has no types for what we need."""

from __future__ import annotations

import ast
from pathlib import Path

from realsr_hpc.paths import project_root

AUTOGRAD = "the context of a torch.autograd.Function"
MEGATRON = "Megatron's (and Transformer Engine's) modules, states and keywords"
VENDORS = {
    "behaviour/logprobs.py": AUTOGRAD,
    "checkpoint/loading.py": MEGATRON,
    "checkpoint/saving.py": MEGATRON,
    "export/hf_config.py": "keywords of transformers' configurations",
    "export/nemo_archive.py": "nemo-toolkit's classes and OmegaConf's trees",
    "model/chunks.py": AUTOGRAD,
    "model/fp8.py": f"{AUTOGRAD}; {MEGATRON}",
    "model/hf_mapping.py": MEGATRON,
    "model/lora.py": f"{AUTOGRAD}; {MEGATRON}",
    "model/precision.py": MEGATRON,
    "model/spec.py": MEGATRON,
    "optim/step.py": MEGATRON,
    "parallel/backend.py": "functions that are replaced in torch.cuda and Megatron",
    "prepare/describe.py": "transformers' pipelines",
    "quality/pyiqa_adapter.py": "pyiqa's metrics",
    "quality/pyiqa_scores.py": "pyiqa's metrics",
    "rollout/decoder.py": MEGATRON,
}
"""Every file that names `Any`, and for whose sake."""


def names_any(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    imported = (alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names)
    return "Any" in imported or "typing.Any" in path.read_text(encoding="utf-8")


def test_any_stands_only_where_a_library_has_no_types(tmp_path: Path) -> None:
    (wrong := tmp_path / "wrong.py").write_text("from typing import Any, Literal\nx: Any = 1\n", encoding="utf-8")
    assert names_any(wrong)
    package = project_root() / "realsr_hpc"
    ours = [path for path in package.rglob("*.py") if "shipped" not in path.parts]  # those go to their users
    assert {path.relative_to(package).as_posix() for path in ours if names_any(path)} == VENDORS.keys()
