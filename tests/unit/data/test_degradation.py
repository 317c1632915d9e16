"""Drawn parameters against the published table, and how the generator is keyed."""

import math
from collections import Counter

import numpy as np
import pytest

from realsr_hpc.data.degradation import (
    MIN_SIDE_PX,
    PRESETS,
    Stream,
    generator,
    noise_field,
    sample_crop,
    sample_degradation,
    sinc_omega_range,
)

DRAWS = 1500


@pytest.fixture(scope="module", params=["realesrgan", "seesr"])
def drawn(request):
    preset = PRESETS[request.param]
    samples = [sample_degradation(generator(3, i, Stream.DEGRADATION), preset, 256, 4) for i in range(DRAWS)]
    return request.param, samples


TABLE = {  # of both stages: resize range, gaussian, poisson, jpeg, blur probability, sigma, largest kernel
    "realesrgan": (
        ((0.15, 1.5), (1, 30), (0.05, 3), (30, 95), 1.0, (0.2, 3), 21),
        ((0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95), 0.8, (0.2, 1.5), 21),
    ),
    "seesr": (
        ((0.3, 1.5), (1, 15), (0.05, 2), (60, 95), 1.0, (0.2, 3), 21),
        ((0.6, 1.2), (1, 12), (0.05, 1), (60, 100), 0.5, (0.2, 1.5), 11),
    ),
}


def near(hits, trials, probability):
    """Within 4.5 standard deviations of a binomial."""
    spread = 4.5 * math.sqrt(max(probability * (1 - probability), 1e-12) * trials)
    return abs(hits - trials * probability) <= spread


def fills(values, low, high):
    """All values are in the range, and some are near each end."""
    span = high - low
    return (
        min(values) >= low
        and max(values) <= high
        and min(values) < low + 0.02 * span < high - 0.02 * span < max(values)
    )


@pytest.mark.parametrize("number", [0, 1])
def test_ranges_are_the_published_ones(drawn, number):
    name, samples = drawn
    resize, gaussian, poisson, jpeg, _, sigma, largest = TABLE[name][number]
    stages = [(s.first, s.second)[number] for s in samples]
    assert fills([s.resize_factor for s in stages if s.resize != "keep"], *resize)
    assert fills([s.noise_level for s in stages if s.noise == "gaussian"], *gaussian)
    assert fills([s.noise_level for s in stages if s.noise == "poisson"], *poisson)
    assert {min(s.jpeg_quality for s in stages), max(s.jpeg_quality for s in stages)} == set(jpeg)
    bells = [s.blur for s in stages if s.blur and s.blur.shape != "sinc"]
    assert fills([b.sigma_x for b in bells], *sigma)
    assert {b.size_px for b in bells} == set(range(7, largest + 1, 2))
    generalised = [b.beta for b in bells if b.shape.startswith("gen")]
    assert 0.5 <= min(generalised) < 0.6 and 3.8 < max(generalised) <= 4
    assert near(sum(beta < 1 for beta in generalised), len(generalised), 0.5)
    assert all(1 <= b.beta <= 2 for b in bells if b.shape.startswith("plateau"))
    plateaus = [b.beta for b in bells if b.shape.startswith("plateau")]
    assert near(sum(beta == 1 for beta in plateaus), len(plateaus), 0.5) and 1.9 < max(plateaus)
    skewed = [b for b in bells if b.shape.endswith("aniso")]
    assert all(b.sigma_x == b.sigma_y and b.rotation == 0 for b in bells if b not in skewed)
    assert fills([b.sigma_y for b in skewed], *sigma) and len({b.sigma_y / b.sigma_x for b in skewed}) > 100
    assert fills([b.rotation for b in skewed], -math.pi, math.pi)
    for cut in (s.blur for s in stages if s.blur and s.blur.shape == "sinc"):
        assert (math.pi / 3 if cut.size_px < 13 else math.pi / 5) <= cut.omega <= math.pi


def test_a_kernel_of_13_px_holds_lower_cut_offs():
    assert [sinc_omega_range(size) for size in (11, 13)] == [(math.pi / 3, math.pi), (math.pi / 5, math.pi)]


@pytest.mark.parametrize("number", [0, 1])
def test_probabilities_are_the_published_ones(drawn, number):
    name, samples = drawn
    stages = [(s.first, s.second)[number] for s in samples]
    words = Counter(s.resize for s in stages)
    for word, p in zip(("upsample", "downsample", "keep"), ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))[number], strict=True):
        assert near(words[word], DRAWS, p), word
    modes = Counter(s.resize_mode for s in stages)
    assert len(modes) == 3 and all(near(count, DRAWS, 1 / 3) for count in modes.values())
    assert near(sum(s.noise == "gaussian" for s in stages), DRAWS, 0.5)
    assert near(sum(s.gray for s in stages), DRAWS, 0.4)
    blurs = [s.blur for s in stages if s.blur]
    assert near(len(blurs), DRAWS, TABLE[name][number][4])
    assert near(sum(b.shape == "sinc" for b in blurs), len(blurs), 0.1)
    shapes = Counter(b.shape for b in blurs if b.shape != "sinc")
    published = dict(iso=0.45, aniso=0.25, gen_iso=0.12, gen_aniso=0.03, plateau_iso=0.12, plateau_aniso=0.03)
    assert set(shapes) == set(published)
    assert all(near(shapes[shape], shapes.total(), p) for shape, p in published.items())


def test_the_end_is_the_published_one(drawn):
    _, samples = drawn
    assert near(sum(s.jpeg_last for s in samples), DRAWS, 0.5)
    sincs = [s.final_sinc for s in samples if s.final_sinc]
    assert near(len(sincs), DRAWS, 0.8)
    assert fills([s.omega for s in sincs], math.pi / 3, math.pi)
    assert {s.size_px for s in sincs} == set(range(7, 22, 2))


def test_words_agree_with_sizes(drawn):
    _, samples = drawn
    for s in samples[:500]:
        for stage, base in ((s.first, 256), (s.second, 64)):
            assert {
                "upsample": stage.side_px >= base,
                "downsample": stage.side_px < base,
                "keep": stage.side_px == base,
            }[stage.resize]


def test_no_image_is_smaller_than_a_jpeg_block():
    sides = []
    for i in range(200):
        drawn = sample_degradation(generator(0, i, Stream.DEGRADATION), PRESETS["realesrgan"], 32, 4)
        sides += [drawn.first.side_px, drawn.second.side_px]
    assert min(sides) == MIN_SIDE_PX


def test_generator_depends_on_seed_index_and_stream_only():
    def numbers(*key):
        return generator(*key).random(4).tolist()

    assert numbers(1, 2, Stream.CROP) == numbers(1, 2, Stream.CROP)
    others = [numbers(2, 2, Stream.CROP), numbers(1, 3, Stream.CROP), numbers(1, 2, Stream.NOISE)]
    assert numbers(1, 2, Stream.CROP) not in others


def test_crop_is_inside_and_as_large_as_said():
    for i in range(300):
        crop = sample_crop(generator(0, i, Stream.CROP), 200, 120, 0.7, 0.5)
        assert 84 <= crop.side <= 120
        assert 0 <= crop.left <= 200 - crop.side and 0 <= crop.top <= 120 - crop.side
    many = [sample_crop(generator(0, i, Stream.CROP), 60, 50, 0.7, 0.3) for i in range(DRAWS)]
    assert {crop.side for crop in many} == set(range(35, 51))
    smallest = [crop for crop in many if crop.side == 36]
    assert {crop.left for crop in smallest} == set(range(25)) and {crop.top for crop in smallest} == set(range(15))
    assert near(sum(crop.flip for crop in many), DRAWS, 0.3)
    flips = [sample_crop(generator(0, i, Stream.CROP), 9, 9, 1.0, 1.0).flip for i in range(9)]
    assert all(flips)


def test_noise_field_is_standard_normal_and_gray_where_said():
    samples = [sample_degradation(generator(0, i, Stream.DEGRADATION), PRESETS["realesrgan"], 128, 4) for i in range(9)]
    for i, stage in enumerate(s.first for s in samples):
        field = noise_field(generator(0, i, Stream.NOISE), stage)
        assert field.shape == (stage.side_px, stage.side_px, 3)
        assert bool(np.all(field[..., 0] == field[..., 2])) == stage.gray
        count = stage.side_px**2
        assert abs(field[..., 0].mean()) < 5 / math.sqrt(count)
        assert abs(field[..., 0].var() - 1) < 5 * math.sqrt(2 / count)
