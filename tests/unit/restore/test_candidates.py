"""Several results of one image: which one is kept, their mean, and what is reported about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from realsr_hpc.config.restoring import RESTORING
from realsr_hpc.config.reward_options import GenerationOptions
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import pyiqa_needs
from realsr_hpc.records import Case, ParsedTrace, RestoredImage
from realsr_hpc.restore import BestOf, Chosen, RestoreSettings, candidates, open_with_options, restore_images
from realsr_hpc.restore.candidates import build_chooser

torch.set_num_threads(1)
SETTINGS = RestoreSettings("here", tile_px=32, model_upscale=4)
TRACE = ParsedTrace("light blur", ("a", "b", "c"), (None,) * 3, ())
DARK = np.random.default_rng(0).integers(0, 128, (32, 32, 3), dtype=np.uint8)


class Tints:
    """Candidate k is half the input, k times 40 grey levels brighter; the second has no image."""

    def candidates(self, cases: list[Case], count: int) -> list[list[RestoredImage]]:
        def tinted(lq, member):
            return (lq.repeat(4, axis=0).repeat(4, axis=1) // 2 + 40 * member).astype(np.uint8)

        rows = [[tinted(case.lq, member) if member != 1 else None for member in range(count)] for case in cases]
        return [[RestoredImage(TRACE, (None, None, image)) for image in row] for row in rows]


class Told:
    """A restorer whose results the test sets, the same for each case."""

    def __init__(self, *results: list[RestoredImage]):
        self.results = results

    def candidates(self, cases: list[Case], count: int) -> list[list[RestoredImage]]:
        return list(self.results)


def numbered(images: list[np.ndarray | None]) -> list[RestoredImage]:
    """Results whose phrase is their number."""
    return [RestoredImage(replace(TRACE, degradation=str(n)), (None, None, image)) for n, image in enumerate(images)]


def test_the_candidate_that_the_expert_likes_best_is_kept_and_said():
    result = restore_images(BestOf(Tints(), 3, build_chooser("fidelity")), [DARK], SETTINGS)[0]
    record = result.tiles[0]
    assert record.chosen == 0 and record.scores[0] > record.scores[2] and np.isnan(record.scores[1])
    mean = restore_images(BestOf(Tints(), 3, build_chooser("mean")), [DARK], SETTINGS)[0].image
    np.testing.assert_array_equal(mean, (DARK.astype(int) // 2 + 40).repeat(4, axis=0).repeat(4, axis=1))
    only = BestOf(Tints(), 1, build_chooser("ranker"))([Case("x", DARK)])[0]
    assert isinstance(only, Chosen) and only.chosen == 0


def test_a_tiles_record_has_the_number_that_was_chosen_and_its_scores_to_four_digits():
    best = BestOf(Tints(), 3, lambda found, case: np.array([0.123456, 0.765432]))
    [record] = restore_images(best, [DARK], SETTINGS)[0].tiles
    assert record.chosen == 2
    np.testing.assert_array_equal(record.scores, [0.1235, np.nan, 0.7654])


def test_what_an_expert_cannot_rate_is_not_chosen_and_the_mean_has_the_nearest_texts():
    images = [np.full((4, 4, 3), value, np.uint8) for value in (10, 13, 21)]
    rated, unseen = numbered(images), numbered([None] * 3)
    cases = [Case("x", images[0])] * 2
    best, nothing = BestOf(Told(rated, unseen), 3, lambda found, case: np.array([np.nan, 0.1, 0.9]))(cases)
    assert isinstance(best, Chosen) and (best.chosen, best.trace.degradation) == (2, "2")
    assert best.image is images[2] and best.scores == (-np.inf, 0.1, 0.9) and nothing is unseen[0]
    mean, _ = BestOf(Told(rated, unseen), 3, None)(cases)
    assert isinstance(mean, Chosen) and (mean.chosen, mean.trace.degradation) == (-1, "1")
    assert (mean.image == 15).all()  # of 14.67
    assert mean.scores == pytest.approx([-((44 / 3 - value) ** 2) for value in (10, 13, 21)], rel=1e-5)


def test_the_nearest_to_the_mean_is_so_over_all_pixels_and_not_at_its_worst():
    """One pixel of 16 is 90 in the second; the third is 12 everywhere. The mean: 34 there, else 4."""
    one_off, flat = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 12, np.uint8)
    one_off[1, 2] = 90
    [mean] = BestOf(Told(numbered([np.zeros_like(flat), one_off, flat])), 3, None)([Case("x", flat)])
    squares = [(34**2 + 15 * 4**2) / 16, (56**2 + 15 * 4**2) / 16, (22**2 + 15 * 8**2) / 16]
    assert isinstance(mean, Chosen) and mean.scores == pytest.approx([-square for square in squares])
    assert mean.trace.degradation == "0"


def test_pyiqas_metric_and_the_folder_of_its_weights_reach_the_expert(tmp_path, monkeypatch):
    """The refusal comes before any part of the model is loaded; pyiqa is an optional extra."""
    for need in pyiqa_needs("choose", ["clipiqa"], str(tmp_path)):
        need.path.parent.mkdir(parents=True, exist_ok=True)
        need.path.touch()
    asked: list[GenerationOptions] = []
    monkeypatch.setattr(candidates, "build_expert", lambda options: asked.append(options) or 1 / 0)
    given = RESTORING | {"candidates": "2", "choose": "pyiqa:clipiqa", "weights_dir": str(tmp_path)}
    with pytest.raises(ZeroDivisionError):
        open_with_options(given, RunConfig(name="x", task="grpo"), None)
    assert asked == [GenerationOptions(expert="pyiqa", metrics=["clipiqa"], weights_dir=str(tmp_path))]


def test_tiles_overlap_by_what_the_command_says_if_no_one_does():
    assert RestoreSettings("x", tile_px=32, model_upscale=4).overlap_px == int(RESTORING["overlap_px"] or 0) == 4
