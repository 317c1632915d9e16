"""Restoring from Python: the README's lines, word for word, and what is refused."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from realsr_hpc.paths import project_root
from realsr_hpc.restore import load


def test_the_readme_restores_a_photograph(tmp_path, monkeypatch, capsys):
    readme = (project_root() / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(from PIL.*?load\(.*?)```", readme, re.DOTALL)
    assert lines is not None
    (tmp_path / "recipes").symlink_to(project_root() / "recipes")
    monkeypatch.chdir(tmp_path)
    exec(compile(lines[1].replace("(96, 64)", "(32, 32)"), "README.md", "exec"), {})  # one tile instead of six
    with Image.open(tmp_path / "restored.png") as restored:
        assert restored.size == (128, 128)
    assert "blur" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "options", "word"), [("nowhere", {}, "nowhere"), ("nowhere", {"temprature": 0.5}, "temprature")]
)
def test_what_cannot_be_opened_is_named(path, options, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        load(tmp_path / path, **options)
