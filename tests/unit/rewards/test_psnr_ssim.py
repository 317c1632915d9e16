import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from realsr_hpc.quality.ladder import noise
from realsr_hpc.quality.psnr_ssim import MAX_PSNR_DB, downscale_area, luma_y, psnr_y, ssim_y

from .conftest import downscale


@pytest.fixture
def pair(photograph):
    return noise(photograph, 0.3, np.random.default_rng(0)), photograph


def test_luma_equals_skimage(photograph):
    np.testing.assert_allclose(luma_y(photograph[None])[0].numpy(), rgb2ycbcr(photograph)[..., 0], atol=1e-9)


@pytest.mark.parametrize("crop", [0, 4])
def test_psnr_equals_skimage(pair, crop):
    inside = slice(crop, 128 - crop)
    ours, truth = (rgb2ycbcr(image)[inside, inside, 0] for image in pair)
    expected = peak_signal_noise_ratio(truth, ours, data_range=255)
    assert psnr_y(pair[0][None], pair[1][None], crop)[0] == pytest.approx(expected, abs=1e-9)


def test_ssim_equals_skimage_on_its_valid_region(pair):
    ours, truth = (rgb2ycbcr(image)[..., 0] for image in pair)
    _, full = structural_similarity(
        truth, ours, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim_y(pair[0][None], pair[1][None])[0] == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_equal_images_are_perfect(photograph):
    assert psnr_y(photograph[None], photograph[None])[0] == MAX_PSNR_DB
    assert ssim_y(photograph[None], photograph[None])[0] == pytest.approx(1.0)


def test_unequal_shapes_are_named(photograph):
    with pytest.raises(ValueError, match=r"128.*64"):
        psnr_y(photograph[None], photograph[None, :64])


def test_area_downscale_is_the_block_mean(photograph):
    small = downscale_area(torch.from_numpy(photograph[None]).double(), (32, 32))[0].numpy()
    np.testing.assert_allclose(np.round(small), downscale(photograph, 4))
