"""Where a run was launched, and what a damaged note of that leaves: the run as its recipe says."""

from __future__ import annotations

import json

import pytest

from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.tracking import Place, moved_to, recipe_of, write_place


@pytest.fixture
def run_dir(tmp_path):
    (folder := tmp_path / "runs" / "a").mkdir(parents=True)
    tree = {"name": "a", "task": "grpo", "output_root": str(tmp_path / "runs")}
    (folder / "recipe.yaml").write_text(to_yaml(RunConfig.model_validate(tree)))
    write_place(folder, Place(str(folder), str(folder.parent)))
    return folder


@pytest.mark.parametrize("text", ["", ".", "x" * 5000, "/" + "x" * 5000, "/a\0b", "/gone/runs/a"])
@pytest.mark.parametrize("field", ["folder", "root"])
def test_a_damaged_place_hides_no_run(run_dir, field, text):
    place = {"folder": str(run_dir), "root": str(run_dir.parent), field: text}
    (run_dir / "place.json").write_text(json.dumps(place))
    assert recipe_of(run_dir).name == "a"
    assert moved_to(run_dir / "recipe.yaml", run_dir) == run_dir / "recipe.yaml"
    moved_to(run_dir / "no such file", run_dir)


def test_files_of_the_run_and_of_its_root_are_found_after_a_move(run_dir, tmp_path):
    own, stages = run_dir / "metrics.md", run_dir.parent / "stages" / "e" / "output" / "metrics.md"
    for path in (own, stages):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "runs").rename(moved := tmp_path / "moved")
    assert moved_to(own, moved / "a") == moved / "a" / "metrics.md"
    assert moved_to(stages, moved / "a") == moved / "stages" / "e" / "output" / "metrics.md"
    assert moved_to(tmp_path / "elsewhere", moved / "a") == tmp_path / "elsewhere"
