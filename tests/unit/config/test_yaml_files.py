"""YAML whose meaning differs from its appearance is refused in every file of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from realsr_hpc.config.load import RecipeError, compose_one, read_axes
from realsr_hpc.config.yaml_files import read_yaml
from realsr_hpc.paths import project_root

NINE = "[" + ", ".join(9 * ["*{}"]) + "]"
BOMB = (
    "a: &a ["
    + "x, " * 9
    + "]\n"
    + "".join(f"{c}: &{c} {NINE.replace('{}', b)}\n" for b, c in zip("abcdefg", "bcdefgh", strict=True))
)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped recipes, with one recipe and one cluster file of the test's own."""
    folder = tmp_path / "recipes"
    for group in ("cluster", "sweeps"):
        (folder / group).mkdir(parents=True)
    for path in (project_root() / "recipes").iterdir():
        if path.name not in ("cluster", "sweeps"):
            (folder / path.name).symlink_to(path)
    for path in (project_root() / "recipes" / "cluster").iterdir():
        (folder / "cluster" / path.name).symlink_to(path)
    monkeypatch.setenv("REALSR_HPC_RECIPES", str(folder))
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time: 12:30:00", "12:30:00 would be read as the number 45000; put it in quotes"),
        ("time: 1:30.5", "1:30.5 would be read as the number 90.5"),
        ("seed: 010", "010 would be read as the number 8"),
        ("a: !!binary aGk=", "holds a bytes"),
        ("a: !!set {b}", "holds a set"),
        ("5: a", "key 5 is not text; put it in quotes"),
        ("on: a", "key True is not text"),
        ("~: a", "key None is not text"),
        ("a: 2024-13-45 25:00:00", ""),
        (BOMB, "its aliases stand for more than 1,000,000 values"),
        ("a: &a {b: *a}", "its aliases stand for more than 1,000,000 values"),
        ("a: !!int x", "not YAML"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(text, said, tmp_path):
    (path := tmp_path / "x.yaml").write_text(text)
    if not said:  # a date is text, whatever its numbers
        assert read_yaml(path) == {"a": text.removeprefix("a: ")}
        return
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_plain_values_are_what_they_are(tmp_path):
    (path := tmp_path / "x.yaml").write_text(
        "\ufeffa: 2024-01-01\r\nb: [1_000, 0x10, 0, -0, 0.5, 1e-3, yes, ~, '010']\r\nc: &c {d: 1}\r\ne: {<<: *c}\r\n",
        encoding="utf-8",
    )
    b = [1000, 16, 0, 0, 0.5, "1e-3", True, None, "010"]
    assert read_yaml(path) == {"a": "2024-01-01", "b": b, "c": {"d": 1}, "e": {"d": 1}}


def test_a_time_in_a_cluster_file_is_not_a_number_of_minutes(recipes):
    slurm = (project_root() / "recipes" / "cluster" / "slurm.yaml").read_text()
    for value, is_refused in {"12:30:00": True, "'12:30:00'": False}.items():
        (recipes / "cluster" / "ours.yaml").write_text(f"{slurm}\nextra_sbatch:\n  deadline: {value}\n")
        (recipes / "mine.yaml").write_text("defaults:\n  - grpo_tiny\n  - override cluster: ours\n  - _self_\n")
        for words in (["recipe=mine"], ["recipe=grpo_tiny", "cluster=ours"]):
            if is_refused:
                with pytest.raises(
                    RecipeError, match=r"ours\.yaml: not YAML \(12:30:00 would be read as the number 45000"
                ):
                    compose_one(words)
            else:
                assert compose_one(words).cluster.extra_sbatch["deadline"] == "12:30:00"


def test_axes_of_dates_are_text_and_a_sweep_where_one_recipe_is_needed_is_named(recipes):
    (recipes / "sweeps" / "s.yaml").write_text("tracking.description: [2024-01-01, 2024-01-02]\n")
    assert read_axes("s") == ["tracking.description='2024-01-01','2024-01-02'"]
    with pytest.raises(RecipeError, match="seed=1,2: several values where one is needed"):
        compose_one(["recipe=grpo_tiny", "seed=1,2"])
