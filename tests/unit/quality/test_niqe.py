import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import gamma
from skimage import data

from realsr_hpc.paths import resolve
from realsr_hpc.quality.ladder import ladder
from realsr_hpc.quality.niqe import (
    NIQEModel,
    _distance,
    fit_aggd,
    fit_pristine,
    halve,
    luminance,
    niqe,
    normalise,
    patch_features,
)
from realsr_hpc.rewards.generation import NIQE_PATH, niqe_to_unit


@pytest.fixture(scope="module")
def model():
    return NIQEModel.load(resolve(NIQE_PATH))


def draw_aggd(shape, left, right, num, rng):
    """Samples of an asymmetric generalised Gaussian from gamma variates."""
    size = rng.gamma(1 / shape, 1.0, num) ** (1 / shape)
    negative = rng.random(num) < left / (left + right)
    return np.where(negative, -left * size, right * size)


@pytest.mark.parametrize(("shape", "left", "right"), [(2.0, 1.0, 1.0), (1.0, 0.5, 1.5), (0.6, 1.0, 0.7)])
def test_fit_recovers_the_parameters_of_a_sample(shape, left, right):
    values = draw_aggd(shape, left, right, 400_000, np.random.default_rng(0))
    got = [float(x) for x in fit_aggd(torch.from_numpy(values)[None])]
    np.testing.assert_allclose(got, [shape, left, right], rtol=0.03)


def test_fit_of_a_standard_normal_has_shape_two_and_its_scale():
    values = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shape, left, right = (float(x) for x in fit_aggd(values[None]))
    assert shape == pytest.approx(2.0, rel=0.03)
    assert left == pytest.approx(np.sqrt(gamma(1 / shape) / gamma(3 / shape)), rel=0.02)
    assert right == pytest.approx(left, rel=0.02)


def test_normalised_coefficients_ignore_brightness_and_halving_keeps_constants(photograph):
    luma = luminance(photograph[None])
    np.testing.assert_allclose(normalise(luma + 20.0)[0], normalise(luma)[0], atol=1e-9)
    np.testing.assert_allclose(halve(torch.full((1, 16, 16), 7.0, dtype=torch.float64)), 7.0)


def test_pristine_fit_keeps_sharp_patches_only(photograph):
    half_soft = photograph.copy()
    half_soft[:, 64:] = 128
    model = fit_pristine([luminance(half_soft[None])[0]], 32, 32, sharp_share=0.3)
    features, sharpness = patch_features(luminance(half_soft[None]), 32, 32)
    chosen = features[0][sharpness[0] > 0.3 * sharpness.max()]
    assert 2 <= len(chosen) <= 8
    np.testing.assert_allclose(model.mean, chosen.mean(dim=0))


@pytest.mark.parametrize("operator", ["blur", "resize", "noise"])
def test_distance_grows_with_degradation(photograph, model, operator):
    scores = niqe(ladder(photograph, [operator], [0.0, 0.3, 1.0], 0), model)
    assert scores[0] < scores[1] < scores[2]


def test_batch_equals_one_by_one_and_small_or_flat_images_are_nan(photograph, other_photograph, model):
    both = niqe([photograph, other_photograph], model)
    assert np.array_equal(both, [niqe([image], model)[0] for image in (photograph, other_photograph)])
    assert np.isnan(niqe([photograph[:32], np.full_like(photograph, 90)], model)).all()


def test_two_patches_a_side_are_enough_and_one_pixel_less_is_not(photograph, model):
    side = 2 * model.patch_px
    sides = {(side, side): True, (side - 1, 200): False, (200, side - 1): False, (1, 1): False, (side + 1, side): True}
    images = [np.resize(photograph, (200, 200, 3))[:height, :width] for height, width in sides]
    assert np.isfinite(niqe(images, model)).tolist() == list(sides.values())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("patch_px", 7, "patches of 7 px"),
        ("patch_px", 1025, "patches of 1025 px"),
        ("stride_px", 0, "at 0"),
        ("mean", np.full(36, np.nan), "NaN or infinite"),
        ("covariance", np.full((36, 36), np.inf), "NaN or infinite"),
        ("covariance", np.eye(35), "it must be"),
    ],
)
def test_a_model_out_of_bounds_is_refused(field, value, said, model, tmp_path):
    dataclasses.replace(model, **{field: value}).save(tmp_path / "model.npz")
    with pytest.raises(ValueError, match=said):
        NIQEModel.load(tmp_path / "model.npz")


def test_model_survives_its_file(model, tmp_path):
    model.save(tmp_path / "model.npz")
    held = NIQEModel.load(tmp_path / "model.npz")
    assert (held.patch_px, held.stride_px) == (model.patch_px, model.stride_px)
    np.testing.assert_array_equal(held.covariance, model.covariance)
    with pytest.raises(ValueError, match="fit-experts"):
        NIQEModel.load(tmp_path / "none.npz")


def test_unit_map_falls_from_one():
    values = niqe_to_unit(np.array([0.0, 6.0, 60.0]))
    assert values[0] == 1.0 and values[1] == 0.5 and 0 < values[2] < 0.02


PYIQA_FEATURES = [  # pyiqa 0.1.15.post2: mean over the 96 px patches of skimage's astronaut, rows and columns 0..383
    2.16275, 0.69908, 0.71275, 0.02274, 0.07722, 0.0884, 0.70169, 0.02235, 0.07565, 0.08603, 0.70856, -0.00762,
    0.08402, 0.0803, 0.71344, -0.01553, 0.089, 0.07915, 2.48025, 0.68677, 0.73675, 0.05508, 0.07088, 0.10409,
    0.73225, 0.07176, 0.06752, 0.10983, 0.74256, 0.01793, 0.08315, 0.09753, 0.74144, -0.01045, 0.09813, 0.08617,
]  # fmt: skip


def test_features_equal_pyiqas():
    image = np.ascontiguousarray(data.astronaut()[:384, :384])
    features, _ = patch_features(luminance(image[None]), 96, 96)
    np.testing.assert_allclose(features[0].mean(dim=0), PYIQA_FEATURES, atol=3e-4)


def test_finite_features_of_a_partly_flat_patch_count_for_the_mean_and_not_for_the_covariance():
    """As in the authors' release; by NumPy."""
    rng = np.random.default_rng(0)
    rows, mean = rng.normal(size=(60, 36)), rng.normal(size=36)
    rows[7, 3], rows[9, 30:] = np.nan, np.inf
    whole = np.delete(rows, (7, 9), axis=0)
    gap = np.nanmean(np.where(np.isfinite(rows), rows, np.nan), axis=0) - mean
    expected = np.sqrt(gap @ np.linalg.pinv((np.cov(whole.T) + np.eye(36)) / 2) @ gap)
    [found] = _distance(torch.from_numpy(rows)[None], NIQEModel(mean, np.eye(36), 32, 32))
    assert found == pytest.approx(expected, rel=1e-9)
