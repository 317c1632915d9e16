"""Evaluating on two ranks: the same numbers and images as on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from realsr_hpc.commands import evaluate
from realsr_hpc.config.learning import RewardsConfig, RewardTerm
from tests.distributed.launcher import run_ranks
from tests.random_run import random_checkpoint, random_recipe


def make_run(folder: Path) -> None:
    """One layer and an image tokenizer, both at random, with a checkpoint."""
    terms = {"fidelity": RewardTerm(kind="fidelity")}
    random_checkpoint(folder, random_recipe(folder, rewards=RewardsConfig(terms=terms)), 1)


def run_tool(arguments: list[str]) -> int:
    """The command, as torchrun starts it."""
    return evaluate.main(arguments)


def test_two_ranks_report_what_one_reports(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_ranks(1, make_run, run_dir)
    for size in (1, 2):
        given = [f"run={run_dir}", "num_images=3", "pyiqa=none", f"output={tmp_path / str(size)}"]
        assert run_ranks(size, run_tool, given) == [0] * size
    tables = [(tmp_path / size / "metrics.csv").read_text().splitlines() for size in "12"]
    assert len(tables[0]) == 1 + 3 * 2 and [row.split(",")[:2] for row in tables[0]] == [
        row.split(",")[:2] for row in tables[1]
    ]
    numbers = [np.array([row.split(",")[2:] for row in table[1:]], dtype=float) for table in tables]
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-4)
    for path in (tmp_path / "1/images/ours").iterdir():
        with Image.open(path) as one, Image.open(tmp_path / "2/images/ours" / path.name) as two:
            # the same tokens; the decoder sees them in other batches, and a value may round the other way
            apart = np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int))
            assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
