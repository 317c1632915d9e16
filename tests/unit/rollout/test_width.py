"""Number of tokens per row in a pass: it affects only the speed, so every choice is checked directly."""

from __future__ import annotations

import pytest

from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.rollout.width import Width


def simulated(width: Width, rows: int, cost, accepted, passes: int = 120) -> list[int]:
    """The widths of some passes."""
    chosen = []
    for _ in range(passes):
        chosen.append(width.choose(rows, True))
        width.record(rows, True, chosen[-1], accepted(chosen[-1]), cost(chosen[-1]))
    return chosen


def test_auto_takes_what_accepts_most_tokens_a_second():
    config = RolloutConfig()
    saturating = lambda width: min(width, 1 + 0.4 * (width - 1), 5.0)  # noqa: E731
    assert simulated(Width(config), 1, lambda width: 1 + 0.02 * width, saturating)[-1] in (8, 16)
    assert simulated(Width(config), 64, lambda width: 0.1 + width, saturating)[-1] == 1
    assert set(simulated(Width(RolloutConfig(lookahead=5)), 64, lambda width: width, saturating)) == {5}


def test_auto_keeps_passes_small():
    width = Width(RolloutConfig())
    assert max(width.choose(64, True) or width.record(64, True, 1, 1, 1) for _ in range(4)) <= 8


def test_widths_are_tried_thrice_until_one_is_far_worse_and_neighbours_are_measured_again():
    """Rates 1, 1.5, 1 for widths 1, 2, 4: below 0.7 of the best trials end; every 32nd pass tries a neighbour."""
    rates = {1: 1.0, 2: 1.5, 4: 1.0}
    chosen = simulated(Width(RolloutConfig()), 1, lambda width: 1.0, rates.__getitem__, passes=97)
    assert chosen[:9] == [1] * 3 + [2] * 3 + [4] * 3
    assert {number: width for number, width in enumerate(chosen[9:], 9) if width != 2} == {32: 4, 64: 1, 96: 4}
    rates[4] = 1.1  # 0.73 of the best: wider ones are tried as well
    assert 8 in simulated(Width(RolloutConfig()), 1, lambda width: 1.0, lambda width: rates.get(width, 0.1))


def test_each_kind_of_tokens_and_each_doubling_of_rows_is_measured_by_itself():
    width = Width(RolloutConfig())
    for _ in range(3):
        width.record(4, True, 1, 1.0, 1.0)
    assert width.choose(7, True) == 2
    assert width.choose(8, True) == width.choose(3, True) == width.choose(4, False) == 1


def test_a_rate_is_the_mean_of_recent_passes_over_the_time_without_other_load():
    width = Width(RolloutConfig())
    for accepted, seconds in ((2.0, 0.4), (4.0, 0.2), (3.0, 1.0)):
        width.record(1, True, 1, accepted, seconds)
    [seen] = width._situations[1, True].seen.values()
    assert seen.rate == pytest.approx(3.0 / (1.02 * 0.2))  # a slow pass is other load; the time may grow slowly
    for _ in range(17):
        width.record(1, True, 1, 3.0, 0.2)
    width.record(1, True, 1, 13.0, 0.2)
    assert seen.rate == pytest.approx((3.0 + 0.1 * 10.0) / 0.2)  # the weight of one pass stays a tenth
