"""The photographs that experts are fitted on, and what is said of a listing or file that cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from realsr_hpc.commands.fit_experts import main, photographs

GREY = np.tile(np.arange(64, dtype=np.uint16) * 1024, (64, 1))


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.new("RGB", (64, 64), (9, 99, 199)).save(tmp_path / "blue.jpg")
    (tmp_path / "torn.png").write_bytes((tmp_path / "grey.png").read_bytes()[:60])
    return tmp_path


def listed(folder, *rows: str | dict) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "photographs.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())


def test_those_of_a_split_are_read_as_training_reads_them(folder):
    rows = [{"path": "grey.png", "split": "train"}, "", {"path": "blue.jpg", "split": "heldout", "more": 1}]
    listed(folder, *rows, {"path": "sub/x.png", "split": "train"}, "  ")
    [grey] = photographs(folder, "train")
    assert np.abs(np.asarray(grey)[..., 0] - GREY / 257).max() <= 0.5  # 16 bits, scaled and not cut off
    assert len(photographs(folder, "heldout")) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1]", "photographs.jsonl:1: not a JSON object with path and split"),
        ('{"path": "grey.png"', "photographs.jsonl:1: not a JSON object"),
        ({"path": 5, "split": "train"}, "photographs.jsonl:1: not a JSON object with path and split"),
        ({"path": "torn.png", "split": "train"}, "torn.png cannot be read (broken"),
        ({"path": "gone.png", "split": "train"}, "gone.png cannot be read (missing"),
        ({"path": "..", "split": "train"}, ".. cannot be read (broken"),
        ({"path": "a\0b", "split": "train"}, "cannot be read ("),
        ({"path": "grey.png", "split": "heldout"}, "lists no photograph of split 'train'"),
        ("", "lists no photograph of split 'train'"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_fitted(row, said, folder, capsys):
    listed(folder, row)
    assert main(["only=niqe", f"photographs={folder}", f"output={folder / 'out'}"]) == 2
    assert said in capsys.readouterr().err and not list((folder / "out").glob("*.npz"))
