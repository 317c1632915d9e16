"""Best, mean and worst of several draws, by numbers that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from realsr_hpc.artifacts import evaluation
from realsr_hpc.evaluate import BICUBIC, Bicubic, Metrics, evaluate
from realsr_hpc.evaluate.draws import over_draws, worst_tenth
from realsr_hpc.evaluate.methods import finished
from realsr_hpc.records import Case

VALUES = np.array([[20.0, 22.0, 27.0], [10.0, np.nan, 14.0], [np.nan, np.nan, np.nan]])


@pytest.mark.parametrize(("lower", "best", "worst"), [(False, 20.5, 15.0), (True, 15.0, 20.5)])
def test_each_images_best_mean_and_worst_are_averaged_over_images(lower: bool, best: float, worst: float) -> None:
    """An image without a value counts nowhere, a missing draw leaves the others."""
    found = over_draws(VALUES, lower_is_better=lower)
    assert (found.best.mean, found.mean.mean, found.worst.mean) == (best, 17.5, worst)
    assert found.best.num_images == 2


def test_a_report_of_several_draws_restores_each_image_anew(tmp_path) -> None:
    """Draw k of a case has its own index; the tables of one draw stay those of the first."""
    truth = np.full((32, 32, 3), 100, np.uint8)
    cases = [Case(key=str(i), lq=truth[::4, ::4], gt=truth, index=i) for i in range(2)]
    seen = []

    def off_by_draw(part):
        seen.extend(case.index for case in part)
        draws = [case.index >> 24 for case in part]
        return [finished(truth + np.uint8(4 * 2**draw)) for draw in draws]

    methods = {BICUBIC: Bicubic(4), "ours": off_by_draw}
    report = evaluate(methods, cases, tmp_path / "out", metrics=Metrics(), draws=3)
    assert sorted(seen) == [index + (draw << 24) for draw in range(3) for index in range(2)]
    values = report.values_of_draws("ours", "psnr_y")
    assert (np.diff(values, axis=1) < -5).all()  # twice the error is 6 dB
    np.testing.assert_array_equal(report.values("ours", "psnr_y"), values[:, 0])
    assert "ours, 3 draws per image" in (text := report.markdown()) and "bicubic, 3 draws" not in text
    again = evaluation.read(tmp_path / "out")
    assert [len(image.methods["ours"].further_draws) for image in again.images] == [2, 2]


def test_the_worst_tenth_is_of_images_and_knows_the_direction() -> None:
    """Two of twenty images; at least one of few."""
    values = np.arange(20.0)
    assert worst_tenth(values, lower_is_better=False) == 0.5
    assert worst_tenth(values, lower_is_better=True) == 18.5
    assert worst_tenth(np.array([3.0, 5.0, np.nan]), lower_is_better=False) == 3.0
    assert np.isnan(over_draws(np.full((2, 2), np.nan), lower_is_better=True).worst_tenth)
