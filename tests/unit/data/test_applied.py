"""The words for an applied degradation, against numbers set by hand."""

from dataclasses import replace

import pytest

from realsr_hpc.data.applied import applied_words
from realsr_hpc.data.degradation import (
    PRESETS,
    DegradationParameters,
    StageParameters,
    Stream,
    generator,
    sample_degradation,
)
from realsr_hpc.data.kernels import KernelParameters

PRESET = PRESETS["realesrgan"]


def stage(sigma=0.3, noise="gaussian", level=1.5, quality=94, resize="keep"):
    blur = None if sigma is None else KernelParameters("iso", 7, sigma, sigma)
    return StageParameters(blur, resize, 1.0, "area", 64, noise, level, False, quality)


def whole(first, second):
    return DegradationParameters(first, second, None, "area", True)


def words(first, second, edges=None):
    return applied_words(whole(first, second), PRESET, edges or {})


def test_light_everywhere():
    assert words(stage(), stage()).phrase == "light blur, keep, light noise, light compression, keep"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (stage(sigma=1.2), stage(), "medium"),  # .2..3: edges 1.133, 2.067
        (stage(sigma=2.1), stage(), "heavy"),
        (stage(), stage(sigma=0.7), "medium"),  # .2..1.5: edges .633, 1.067
        (stage(), stage(sigma=1.1), "heavy"),
        (stage(sigma=1.2), stage(sigma=1.1), "heavy"),
        (stage(sigma=1.2), stage(sigma=None), "medium"),
    ],
)
def test_blur_is_that_of_the_heavier_stage(first, second, expected):
    assert words(first, second).blur == expected


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (stage(level=10.0), "light"),  # 1..30: edges 10.67, 20.33
        (stage(level=11.0), "medium"),
        (stage(level=21.0), "heavy"),
        (stage(noise="poisson", level=1.0), "light"),  # .05..3: edges 1.033, 2.017
        (stage(noise="poisson", level=1.1), "medium"),
        (stage(noise="poisson", level=2.1), "heavy"),
    ],
)
def test_noise_by_its_own_range(first, expected):
    assert words(first, stage()).noise == expected


@pytest.mark.parametrize(("quality", "expected"), [(51, "heavy"), (52, "medium"), (73, "medium"), (74, "light")])
def test_low_quality_is_heavy_compression(quality, expected):
    assert words(stage(quality=quality), stage()).compression == expected


def test_low_cut_off_is_heavy_blur():
    def sinc(omega):
        return words(replace(stage(), blur=KernelParameters("sinc", 7, omega=omega)), stage(sigma=None)).blur

    assert [sinc(1.1), sinc(2.0), sinc(3.0)] == ["heavy", "medium", "light"]  # pi/3..pi: edges 1.745, 2.443


def test_resize_words_pass_through():
    said = words(stage(resize="upsample"), stage(resize="downsample"))
    assert (said.resize1, said.resize2) == ("upsample", "downsample")


def test_edges_of_the_recipe_win_in_their_stage_only():
    edges = {"blur_sigma_first": (0.1, 0.2)}
    assert words(stage(sigma=0.3), stage(), edges).blur == "heavy"
    assert words(stage(sigma=None), stage(sigma=0.3), edges).blur == "light"


def test_every_word_occurs_among_drawn_samples():
    drawn = [sample_degradation(generator(0, i, Stream.DEGRADATION), PRESET, 128, 4) for i in range(300)]
    labels = [applied_words(p, PRESET, {}) for p in drawn]
    for slot in ("blur", "noise", "compression", "resize1", "resize2"):
        assert len({getattr(found, slot) for found in labels}) == 3, slot
