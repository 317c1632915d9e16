"""Folders and files that are closed to the user: said in a line, and what is not closed is done."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

NOBODYS = "setpriv --bounding-set=-dac_override,-dac_read_search".split()
"""The root user that runs the tests may read everything otherwise."""
PROGRAM = "import sys; from realsr_hpc.commands import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def pictures(tmp_path):
    """Folders `open`, `closed`, and `listed`, whose names can be read but nothing in it."""
    for folder, mode in {"in": 0o755, "in/open": 0o755, "in/closed": 0o000, "in/listed": 0o444}.items():
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 64), (9, 99, 199)).save(tmp_path / folder / f"{folder[3:] or 'top'}.png")
        (tmp_path / folder).chmod(mode)
    yield tmp_path / "in"
    for folder in ("closed", "listed"):
        (tmp_path / "in" / folder).chmod(0o755)


def answer(*words: str) -> tuple[int, str]:
    command = [*NOBODYS, sys.executable, "-c", PROGRAM, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "Traceback" not in said, said
    return ended.returncode, said


def test_of_a_source_with_closed_folders_the_rest_is_prepared(pictures, tmp_path):
    code, said = answer("prepare-data", f"source={pictures}", f"output={tmp_path / 'out'}", "num_threads=1")
    assert code == 1 and "2 photographs" in said
    assert "closed: folder: Permission denied" in said and "listed/listed.png: broken: [Errno 13] Permission" in said


def test_downloads_with_closed_folders_are_looked_through(pictures):
    code, said = answer("stage-weights", "recipe=sft_7b", f"downloads={pictures}")
    assert code == 1 and f"{pictures}/closed: skipped (Permission denied)" in said


@pytest.mark.parametrize(
    "command",
    [
        "jobs root={0}",
        "sync-tracking root={0}",
        "stage-weights recipe=sft_7b downloads={0}",
        "export-hf run={0} output=x",
    ],
)
def test_a_closed_folder_that_is_named_is_told_as_such(command, pictures):
    code, said = answer(*command.format(pictures / "closed").split())
    assert code == 2 and f"'{pictures}/closed" in said and "Permission denied" in said
