import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from realsr_hpc.config.learning import RewardTerm
from realsr_hpc.config.reward_options import FidelityOptions, read_options
from realsr_hpc.quality.ladder import blur, noise
from realsr_hpc.quality.psnr_ssim import psnr_y, ssim_y
from realsr_hpc.rewards.fidelity import FidelityReward

from .conftest import make_candidate, make_trace


def test_the_truth_beats_another_image_and_a_shifted_tint(photograph, other_photograph):
    lq = make_candidate(photograph).lq
    tinted = np.clip(photograph.astype(int) + [25, 0, -25], 0, 255).astype(np.uint8)
    items = [make_candidate(image, lq=lq) for image in (photograph, tinted, other_photograph)]
    for metric in ("psnr", "l1"):
        scores = FidelityReward(FidelityOptions(metric=metric)).score(items)
        assert scores[0] > scores[1] > scores[2]


def test_smoothing_makes_it_robust_to_noise_of_the_lq_image(photograph):
    noisy = noise(make_candidate(photograph).lq, 0.5, np.random.default_rng(0))
    items = [make_candidate(photograph, lq=noisy)]
    plain, smoothed = (FidelityReward(FidelityOptions(smooth_px=s)).score(items)[0] for s in (0.0, 1.0))
    assert smoothed > plain + 0.1


def test_both_sides_are_smoothed_alike_with_repeated_borders(photograph, other_photograph):
    """By SciPy's filter of the same reach, 3 sigma."""
    image, lq = photograph, make_candidate(other_photograph).lq
    small = image.reshape(32, 4, 32, 4, 3).astype(np.float64).mean((1, 3))
    pair = (gaussian_filter(side, (1.3, 1.3, 0), mode="nearest", truncate=3.0) for side in (small, lq.astype(float)))
    expected = 1 - np.abs(np.subtract(*pair)).mean() / 255
    options = FidelityOptions(metric="l1", smooth_px=1.3)
    [score] = FidelityReward(options).score([make_candidate(image, lq=lq)])
    assert score == pytest.approx(expected, abs=1e-6)
    trace = make_trace(images=(None, None, np.zeros((8, 8), np.int64)))
    [places] = FidelityReward(options).score_places([make_candidate(image, trace, lq=lq)])
    assert 1 + places.mean() / 255 == pytest.approx(score, abs=1e-6)


def test_psnr_map_has_its_ends(photograph):
    lq = make_candidate(photograph).lq
    reward = FidelityReward(FidelityOptions(smooth_px=0.0, psnr_low=20.0, psnr_high=30.0))
    off = np.full_like(photograph, 0) + np.repeat(np.repeat(lq, 4, 0), 4, 1).astype(int)
    shifted = np.where(off > 127, off - 14, off + 14).astype(np.uint8)
    expected = (20 * np.log10(255 / 14) - 20) / 10
    assert reward.score([make_candidate(shifted, lq=lq)])[0] == pytest.approx(expected, abs=1e-5)


def test_reference_gt_compares_at_full_size(photograph):
    soft = blur(photograph, 0.5, np.random.default_rng(0))
    items = [make_candidate(soft, gt=photograph), make_candidate(soft, gt=None)]
    options = FidelityOptions(reference="gt", metric="ssim")
    scores = FidelityReward(options).score(items)
    assert scores[0] == pytest.approx(ssim_y(soft[None], photograph[None])[0]) and scores[1] == 0.0
    assert psnr_y(soft[None], photograph[None])[0] > 15


def test_many_sizes_in_one_batch(photograph, other_photograph):
    items = [make_candidate(photograph), make_candidate(other_photograph[:64]), make_candidate(photograph)]
    scores = FidelityReward(FidelityOptions()).score(items)
    assert scores[0] == scores[2] and (scores > 0.8).all()


def test_the_place_of_each_code_is_scored(photograph):
    """Their mean is minus the squared error that PSNR is of; a spoilt square is the worst; ssim has no places."""
    grid = np.zeros((16, 16), np.int64)
    trace = make_trace(images=(None, None, grid))
    spoilt = photograph.copy()
    spoilt[40:48, 72:80] = 255 - spoilt[40:48, 72:80]  # row 5, column 9 of codes of 8 px
    items = [make_candidate(image, trace, lq=make_candidate(photograph).lq) for image in (photograph, spoilt)]
    reward = FidelityReward(FidelityOptions(smooth_px=0.0))
    clean, worse = reward.score_places([*items, make_candidate(None, trace)])[:2]
    assert np.isnan(reward.score_places([*items, make_candidate(None, trace)])[2]).all()
    assert np.flatnonzero(worse != clean) == [5 * 16 + 9] and worse.argmin() == 5 * 16 + 9
    decibels = 10.0 + 30.0 * reward.score(items[1:])[0]
    assert 10 * np.log10(255**2 / -worse.mean()) == pytest.approx(decibels, abs=1e-4)
    assert FidelityReward(FidelityOptions(metric="ssim")).score_places(items) is None


def test_crossed_ends_are_refused():
    for options, message in (
        ({"psnr_low": 50}, "psnr_low=50"),
        ({"metric": "pyiqa", "metrics": ["lpips"]}, "set reference=gt"),
        ({"metrics": ["lpips"]}, "only metric=pyiqa takes metrics"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options("fidelity", RewardTerm(kind="fidelity", options=options))
