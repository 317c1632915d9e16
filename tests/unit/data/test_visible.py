"""Visible strength of each degradation, against chains run with PyTorch and OpenCV with and without that part."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy.stats import spearmanr
from skimage import data

from realsr_hpc.config.schema import DegradationConfig
from realsr_hpc.data.degradation import PRESETS, Stream, generator, noise_field, sample_degradation
from realsr_hpc.data.kernels import build_kernel
from realsr_hpc.data.labels import Labeller
from realsr_hpc.data.operators import operators_of
from realsr_hpc.data.visible import tercile_edges, visible

from . import reference

LEVELS = ("light", "medium", "heavy")


def drawn(preset, gt_px, count, first=0):
    keys = ((11, index, Stream.DEGRADATION) for index in range(first, first + count))
    return [sample_degradation(generator(*key), PRESETS[preset], gt_px, 4) for key in keys]


def filter2d(image, kernel):
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def linear_chain(image, p, lq_px):
    """Only blurs and resizes, [H, H, n]."""
    for stage in (p.first, p.second):
        image = reference.resize(filter2d(image, build_kernel(stage.blur)), stage.resize_mode, stage.side_px)
    return filter2d(reference.resize(image, p.final_resize_mode, lq_px), build_kernel(p.final_sinc))


@pytest.mark.parametrize(("preset", "gt_px"), [("realesrgan", 128), ("realesrgan", 256), ("seesr", 128)])
def test_blur_is_the_width_of_the_response_to_gratings(preset, gt_px):
    lq_px = gt_px // 4
    centres = (np.arange(8) + 0.5) * np.pi / 8
    u, v = (axis.ravel() for axis in np.meshgrid(centres, np.concatenate([centres, -centres]), indexing="ij"))

    def gratings(side):
        place = ((np.arange(side) + 0.5) / side - 0.5) * lq_px
        return np.cos(np.multiply.outer(place, u)[:, None] + np.multiply.outer(place, v)[None]).astype(np.float32)

    inner = slice(lq_px // 4, -lq_px // 4)
    target = gratings(lq_px)[inner, inner]
    for p in drawn(preset, gt_px, 4):
        left = linear_chain(gratings(gt_px), p, lq_px)[inner, inner]
        gain = (left * target).mean((0, 1)) / (target**2).mean((0, 1))
        measured = 1 / np.sqrt(4 * np.pi * (gain**2).mean())
        assert visible(p, operators_of(p, lq_px), gt_px, lq_px).blur_px == pytest.approx(measured, rel=0.08)


def chain(gt, p, lq_px, fields):
    """As `reference.degrade` without rounding at the end; a quality of 0 means no JPEG."""

    def jpeg(x, quality):
        return reference.jpeg(x, quality) if quality else np.clip(x, 0, 1)

    x = gt
    for stage, field in zip((p.first, p.second), fields, strict=True):
        x = reference.resize(filter2d(x, build_kernel(stage.blur)), stage.resize_mode, stage.side_px)
        x = reference.add_noise(x, field, stage)
        if stage is p.first or not p.jpeg_last:
            x = jpeg(x, stage.jpeg_quality)
    x = filter2d(reference.resize(x, p.final_resize_mode, lq_px), build_kernel(p.final_sinc))
    return jpeg(x, p.second.jpeg_quality) if p.jpeg_last else np.clip(x, 0, 1)


def without_jpeg(p):
    return replace(p, first=replace(p.first, jpeg_quality=0), second=replace(p.second, jpeg_quality=0))


@pytest.mark.parametrize(("preset", "gt_px"), [("realesrgan", 64), ("realesrgan", 128), ("seesr", 128)])
def test_noise_and_compression_follow_what_is_measured(preset, gt_px):
    """Order and size agree with chains run with and without their noise, and with and without their JPEGs."""
    lq_px, photographs = gt_px // 4, [data.astronaut(), data.coffee(), data.chelsea()]
    measured, found = [], []
    for number, p in enumerate(drawn(preset, gt_px, 50)):
        picture = photographs[number % 3][:300, 60:360].astype(np.float32) / 255
        gt = reference.resize(picture, "area", gt_px)
        rng = generator(11, number, Stream.NOISE)
        fields = [noise_field(rng, p.first), noise_field(rng, p.second)]
        whole = chain(gt, p, lq_px, fields)
        silent = chain(gt, p, lq_px, [0 * field for field in fields])
        pure = chain(gt, without_jpeg(p), lq_px, fields)
        measured.append([255 * np.sqrt(np.mean((whole - other) ** 2)) for other in (silent, pure)])
        seen = visible(p, operators_of(p, lq_px), gt_px, lq_px, brightness=255 * float(gt.mean()))
        found.append([seen.noise_rms, seen.compression_rms])
    for true, said, least in zip(np.transpose(measured), np.transpose(found), (0.85, 0.7), strict=True):
        assert spearmanr(true, said).statistic > least
        assert 0.4 < np.median(said / true) < 1.1


@pytest.mark.parametrize(("preset", "gt_px"), [("realesrgan", 128), ("seesr", 512)])
def test_each_word_is_about_as_frequent(preset, gt_px):
    label = Labeller(DegradationConfig(preset=preset), gt_px, 4)
    grey = np.full((8, 8, 3), 115, np.uint8)
    found = [label(p, operators_of(p, gt_px // 4), grey) for p in drawn(preset, gt_px, 300, first=1000)]
    for slot in ("blur", "noise", "compression"):
        shares = [np.mean([getattr(words, slot) == level for words in found]) for level in LEVELS]
        assert min(shares) > 0.24 and max(shares) < 0.43, (slot, shares)


def test_edges_of_the_recipe_win_and_brightness_moves_poisson_noise_alone():
    grey, [p] = np.full((8, 8, 3), 115, np.uint8), drawn("realesrgan", 128, 1)
    operators = operators_of(p, 32)
    for number, edges in enumerate([(100.0, 200.0), (0.01, 200.0), (0.01, 0.02)]):
        label = Labeller(DegradationConfig(severity_edges={"blur_px": edges}), 128, 4)
        assert label(p, operators, grey).blur == LEVELS[number]
    quiet = replace(p, first=replace(p.first, noise_level=0.0))
    for noise, moves in (("gaussian", False), ("poisson", True)):
        q = replace(quiet, second=replace(p.second, noise=noise, noise_level=2.0))
        dark, bright = (visible(q, operators, 128, 32, brightness) for brightness in (20.0, 200.0))
        assert (dark.noise_rms < 0.5 * bright.noise_rms) == moves and dark.blur_px == bright.blur_px
    between = {"noise_rms": ((dark.noise_rms + bright.noise_rms) / 2, 1000.0)}
    label = Labeller(DegradationConfig(severity_edges=between), 128, 4)
    seen = [label(q, operators, np.full((8, 8, 3), level, np.uint8)).noise for level in (20, 200)]
    assert seen == ["light", "medium"]  # by the mean of the photograph


def test_edges_are_the_same_wherever_they_are_derived():
    before = tercile_edges("seesr", 64, 4)
    tercile_edges.cache_clear()
    assert tercile_edges("seesr", 64, 4) == before
