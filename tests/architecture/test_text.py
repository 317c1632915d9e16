"""Text is UTF-8 whatever the locale says: every call that reads or writes it says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from realsr_hpc.paths import project_root

OPENED_OTHERWISE = {"Image", "tarfile", "os", "Tracker", "safetensors", "known", "self", "self._delivery"}


def unsaid(path: Path) -> Iterator[str]:
    """Lines that leave the encoding to the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or "encoding" in {word.arg for word in node.keywords}:
            continue
        name = ast.unparse(node.func)
        called, owner = name.rpartition(".")[2], name.rpartition(".")[0]
        binary = any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in node.args[:2])
        opened = called == "open" and not binary and owner not in OPENED_OTHERWISE
        locale = any(word.arg in ("text", "universal_newlines") for word in node.keywords) and owner == "subprocess"
        temporary = called in ("TemporaryFile", "NamedTemporaryFile") and bool(node.args) and not binary
        if called in ("read_text", "write_text") or opened or locale or temporary:
            yield f"{path}:{node.lineno} {ast.unparse(node)}"


def test_every_text_file_is_opened_as_utf_8(tmp_path: Path) -> None:
    (wrong := tmp_path / "wrong.py").write_text(
        "Path('x').read_text()\nopen('x', 'w')\nopen('x', 'rb')\nsubprocess.run(['x'], text=True)\n"
    )
    assert len(list(unsaid(wrong))) == 3
    files = [path for folder in ("realsr_hpc", "tools") for path in (project_root() / folder).rglob("*.py")]
    assert [line for path in files for line in unsaid(path)] == []
