"""Restoring from Python: the README's example, unchanged, and the refused arguments."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from realsr_hpc.paths import project_root
from realsr_hpc.restore import load
from realsr_hpc.restore.model import origin_of
from realsr_hpc.restore.simple import Model
from tests.unit.restore.test_restore import SETTINGS, nearest, noise


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


def test_an_opened_picture_is_seen_as_its_file_is(tmp_path):
    grey = noise(20, 30)[..., 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "float.tif": (Image.fromarray(grey.astype(np.float32) / 255), {}),
        "turned.jpg": (Image.fromarray(grey), {"exif": exif}),
        "alpha.png": (Image.fromarray(noise(20, 30, 4)), {}),
    }
    model = Model(nearest, SETTINGS)
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as image:
            opened = np.asarray(model.restore(image).image)
        np.testing.assert_array_equal(opened, np.asarray(model.restore(tmp_path / name).image))
        assert opened.std() > 50  # not cut off to white


def test_what_restored_is_told_from_others_and_not_by_where_it_lies(tmp_path):
    step = tmp_path / "runs" / "a-0123" / "checkpoints" / "step-000004"
    export = tmp_path / "export"
    for folder, listing in ((step, "manifest.json"), (export, "SHA256SUMS")):
        folder.mkdir(parents=True)
        (folder / listing).write_text("one")
    of_run, of_export = origin_of(str(step)), origin_of(str(export))
    assert of_run.startswith("a-0123/checkpoints/step-000004/sha256:") and of_export.startswith("export/sha256:")
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert origin_of(str(tmp_path / "moved" / step.relative_to(tmp_path / "runs"))) == of_run
    (export / "SHA256SUMS").write_text("another export in its place")
    assert origin_of(str(export)) != of_export and origin_of("") == ""
