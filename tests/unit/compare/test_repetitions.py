"""Means, pairs and costs of repetitions, of numbers that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from realsr_hpc.compare.repetitions import Group
from realsr_hpc.compare.runs import ComparedRun


def run(seed: int, histories: dict | None = None, params: dict | None = None, **metrics: float) -> ComparedRun:
    known = {"seed": str(seed), **(params or {})}
    return ComparedRun(str(seed), str(seed), "FINISHED", known, metrics, histories=histories or {})


def test_differences_are_of_runs_of_one_seed_whatever_their_order():
    """3 - 1 and 5 - 4; seeds 7 and 9 have no counterpart, 8 has no value."""
    ours = Group("ours", (run(0, m=3.0), run(1, m=5.0), run(9, m=50.0), run(8)))
    base = Group("base", (run(7, m=100.0), run(1, m=4.0), run(8, m=2.0), run(0, m=1.0)))
    found = ours.less(base, "m")
    half = student.ppf(0.975, 1) * np.std([2.0, 1.0], ddof=1) / np.sqrt(2)
    assert (found.mean, found.num_runs) == (1.5, 2)
    assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))


def test_a_curve_has_the_steps_of_all_runs_between_their_lowest_and_highest():
    first, second = [(1, 1.0), (2, 4.0), (4, 8.0)], [(2, 2.0), (3, 9.0), (4, 10.0)]
    group = Group("a", (run(0, {"m": first}), run(1, {"m": second}), run(2)))
    assert [column.tolist() for column in group.curve("m")] == [[2, 4], [3.0, 9.0], [2.0, 8.0], [4.0, 10.0]]
    assert group.change("m").mean == pytest.approx((7.0 + 8.0) / 2)


def test_costs_are_of_all_processes_and_tokens_of_the_data_parallel_ones():
    """36 s on 2 x 6 processes, of which 3 x 2 hold one model; step 3's rollouts were not timed."""
    histories = {
        "time/rollout/s": [(1, 2.0), (2, 3.0)],
        "time/update/s": [(1, 31.0)],
        "rollout/tokens_per_s/mean": [(1, 10.0), (2, 20.0), (3, 5.0)],
    }
    layout = {"cluster.nodes": "2", "cluster.tasks_per_node": "6", "parallel.tp": "3", "parallel.pp": "2"}
    group = Group("a", (run(0, histories, layout), run(1)))
    assert group.process_hours().mean == pytest.approx(36 * 12 / 3600) and group.process_hours().num_runs == 1
    assert group.rollout_tokens().mean == (2 * 10 + 3 * 20) * 2
