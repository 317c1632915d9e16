"""What a comparison says in words: the best group, its difference from the first, and what training changed."""

from __future__ import annotations

import pytest

from realsr_hpc.compare.repetitions import group_runs
from realsr_hpc.compare.runs import ComparedRun, Comparison
from realsr_hpc.compare.summary import change_table, verdict

METRIC = "heldout/total/mean"


def compared(**groups: list[float]) -> Comparison:
    """Runs of seeds 0, 1, ... with these last values; each began at 1."""
    runs = [
        ComparedRun(
            f"{name}{seed}",
            f"{name}{seed}",
            "FINISHED",
            {"task": "grpo", "optim.lr": name, "seed": str(seed)},
            {METRIC: value},
            histories={METRIC: [(0, 1.0), (5, value)]},
        )
        for name, values in groups.items()
        for seed, value in enumerate(values)
    ]
    return Comparison(tuple(runs), ("optim.lr", "seed"), METRIC)


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ([3.0, 3.3], "Difference from lr=a, paired by seed: 2.1 [0.8294, 3.371]: more than chance at 95 %."),
        ([3.0, 9.1], "Difference from lr=a, paired by seed: 5 [-33.12, 43.12]: not more than chance at 95 %."),
    ],
)
def test_the_best_is_told_by_its_difference_from_the_first(best, said):
    comparison = compared(a=[1.0, 1.1], b=best)
    assert verdict(comparison, group_runs(comparison)).endswith(said)
    comparison = compared(a=[9.0, 9.9], b=best[:1])
    assert "Difference" not in verdict(comparison, group_runs(comparison))  # the first is the best


def test_what_training_changed_stands_beside_its_difference_from_the_first():
    comparison = compared(a=[2.0, 2.0], b=[4.0, 4.0])
    rows = change_table(comparison, group_runs(comparison)).rows
    assert rows == [[METRIC, "1 [1, 1]", "3 [3, 3]"], [f"{METRIC}, less lr=a, paired by seed", "", "2 [2, 2]"]]
