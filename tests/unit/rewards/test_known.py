"""Fidelity under the recorded degradation: the operators are those of the data room, and what they make of images."""

from dataclasses import replace

import numpy as np
import pytest

from realsr_hpc.config.learning import RewardTerm
from realsr_hpc.config.reward_options import FidelityOptions, read_options
from realsr_hpc.data.dali_pipeline import DegradationPipeline
from realsr_hpc.data.degradation import PRESETS, Stream, generator, sample_degradation
from realsr_hpc.data.graph_inputs import DegradationInput
from realsr_hpc.data.kernels import KernelParameters
from realsr_hpc.data.operators import operators_of
from realsr_hpc.pixels import degraded
from realsr_hpc.quality.ladder import blur
from realsr_hpc.records import JPEG, Blur, ResizeTo
from realsr_hpc.rewards.fidelity import FidelityReward

from .conftest import make_candidate

NUM = 16
KNOWN = FidelityReward(FidelityOptions(degradation="known"))
PLAIN = FidelityReward(FidelityOptions())


def drawn(number, noise_level, **changes):
    """Parameters as training draws them, but for Gaussian noise of this level, of 255."""
    p = sample_degradation(generator(11, number, Stream.DEGRADATION), PRESETS["realesrgan"], 128, 4)
    quiet = {"noise": "gaussian", "noise_level": noise_level}
    return replace(p, first=replace(p.first, **quiet, **changes), second=replace(p.second, **quiet))


@pytest.fixture(scope="module")
def degrade(photograph):
    """LQ images that the data room makes of the photograph."""
    pipeline = DegradationPipeline(NUM, 128, 4, usm_sharpen_gt=False)

    def run(parameters):
        noise = [generator(11, number, Stream.NOISE) for number in range(len(parameters))]
        return pipeline.run([DegradationInput(photograph, *row) for row in zip(parameters, noise, strict=True)])[0]

    return run


def test_without_noise_the_operators_give_the_data_rooms_pixels(photograph, degrade):
    """Every kind of kernel and resize, both orders of the end; JPEG magnifies a level that rounds otherwise."""
    parameters = [drawn(number, 0.0) for number in range(NUM)]
    away = [
        np.abs(lq - np.rint(degraded(photograph, operators_of(p, 32)))).mean()
        for lq, p in zip(degrade(parameters), parameters, strict=True)
    ]
    assert len({p.jpeg_last for p in parameters}) == 2
    assert max(away) < 1.5 and sorted(away)[NUM // 2] < 0.1


def test_the_truth_wins_under_strong_degradations_where_plain_downscaling_wants_a_blurred_one(
    photograph, other_photograph, degrade
):
    strong = {"blur": KernelParameters("iso", 21, 2.8, 2.8), "side_px": 48, "jpeg_quality": 60}
    parameters = [drawn(number, 1.0, **strong) for number in range(8)]
    rng = np.random.default_rng(0)
    images = [photograph, blur(photograph, 1.0, rng), other_photograph]
    plain_wants_the_truth = 0
    for lq, p in zip(degrade(parameters), parameters, strict=True):
        copy = np.repeat(np.repeat(lq, 4, 0), 4, 1)
        known = operators_of(p, 32)
        items = [make_candidate(image, lq=lq, operators=known) for image in [*images, copy]]
        scores, plain = KNOWN.score(items), PLAIN.score(items)
        assert scores[0] > scores[1:].max()
        plain_wants_the_truth += plain[0] > plain[1:].max()
    assert plain_wants_the_truth == 0


def test_plain_downscaling_is_the_special_case_of_one_area_resize(photograph):
    lq = make_candidate(photograph).lq
    items = [make_candidate(blur(photograph, 0.3, np.random.default_rng(0)), lq=lq, operators=(ResizeTo(32, "area"),))]
    assert KNOWN.score(items)[0] == pytest.approx(PLAIN.score(items)[0], abs=1e-6)


def test_what_is_not_recorded_is_not_guessed(photograph):
    scores, broken = KNOWN.score_counted([make_candidate(photograph, gt=photograph)])
    assert scores[0] == 0.0 and not broken[0]
    small = make_candidate(photograph[:64, :64], gt=photograph, operators=(JPEG(50),))
    assert KNOWN.score_counted([small])[1][0]  # an image of another size than its degradation was drawn for
    with pytest.raises(ValueError, match="set reference=lq"):
        read_options("fidelity", RewardTerm(kind="fidelity", options={"degradation": "known", "reference": "gt"}))


def test_a_kernel_wider_than_the_image_is_reflected_again_and_again():
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    kernel = np.random.default_rng(1).random((21, 21), np.float32)
    padded = np.pad(image.astype(np.float32), ((10, 10), (10, 10), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (21, 21), axis=(0, 1))
    expected = np.einsum("yxcij,ij->yxc", windows, kernel / kernel.sum())
    np.testing.assert_allclose(degraded(image, (Blur(kernel / kernel.sum()),)), expected, atol=1e-2)
