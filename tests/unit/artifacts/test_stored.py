"""Records on disk: which contents are refused, and numbers that JSON cannot express (NaN, infinity)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from realsr_hpc.artifacts import restoration, stored
from realsr_hpc.artifacts.stored import Damaged, Inside, Number, Whole


@dataclass(frozen=True)
class Record:
    whole: Whole = 3
    number: Number = 0.5
    file: Inside = "a.png"
    version: int = 2


@pytest.mark.parametrize(
    "wrong",
    [{"whole": value} for value in (True, "3", 3.0, 1.5)]
    + [{"number": value} for value in (True, "0.5")]
    + [{"file": value} for value in ("/etc/passwd", "../a.png", "", 3)],
)
def test_values_of_another_type_and_files_of_elsewhere_are_refused(wrong, tmp_path: Path):
    path = tmp_path / "record.json"
    stored.write(path, Record())
    assert stored.read(path, Record, 2) == Record()
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(Damaged, match=next(iter(wrong))):
        stored.read(path, Record, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null_in_the_file(value, tmp_path: Path):
    stored.write(tmp_path / "record.json", Record(number=value))
    assert json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)["number"] is None
    assert math.isnan(stored.read(tmp_path / "record.json", Record, 2).number)


def test_a_newer_version_is_refused_and_an_older_one_read(tmp_path: Path):
    stored.write(tmp_path / "record.json", Record())
    assert stored.read(tmp_path / "record.json", Record, 3).version == 2
    with pytest.raises(Damaged, match="version 2 of its format, this program reads 1"):
        stored.read(tmp_path / "record.json", Record, 1)


def test_a_restoration_lists_tiles(tmp_path: Path):
    """Another program's NAME.json has none."""
    (tmp_path / "photo.json").write_text('{"tiles": []}')
    with pytest.raises(Damaged, match="no tiles"):
        restoration.read(tmp_path / "photo.png")
