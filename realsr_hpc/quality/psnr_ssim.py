"""Full-reference metrics without weights: PSNR and SSIM on luma, and the area downscale of the fidelity reward.

Colour space: luma Y of YCbCr by ITU-R BT.601, 16..235, not rounded (MATLAB's rgb2ycbcr, as usual in super-resolution).
Images are RGB uint8; the data range is 255. `crop_px` pixels are cropped at each border, by default none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_PSNR_DB = 100.0
"""PSNR of equal images, so that means stay finite."""
_Y_WEIGHTS = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_SSIM_SIGMA = 1.5
SSIM_MIN_PX = 11
"""Smallest side for which SSIM is defined: that of its window."""
_SSIM_RADIUS = 5


def luma_y(images: np.ndarray) -> Tensor:
    """BT.601 luma of RGB uint8 [n, H, W, 3]: float64 [n, H, W] in 16..235."""
    return torch.from_numpy(np.array(images)).double() @ torch.tensor(_Y_WEIGHTS, dtype=torch.float64) + 16.0


def psnr_y(sr: np.ndarray, gt: np.ndarray, crop_px: int = 0) -> np.ndarray:
    """PSNR [n] in dB on luma of pairs of RGB uint8 images [n, H, W, 3], at most `MAX_PSNR_DB`; higher is better."""
    ours, truth = _pair(sr, gt, crop_px)
    return psnr_db((ours - truth).square().mean(dim=(1, 2))).numpy()


def ssim_y(sr: np.ndarray, gt: np.ndarray, crop_px: int = 0) -> np.ndarray:
    """SSIM [n] in -1..1 on luma of pairs of RGB uint8 images [n, H, W, 3]; higher is better.

    Wang et al. 2004: Gaussian window of 11 px with sigma 1.5, K 0.01 and 0.03, valid region. NaN if a side is below
    `SSIM_MIN_PX` after cropping.
    """
    ours, truth = _pair(sr, gt, crop_px)
    if min(ours.shape[1:]) < SSIM_MIN_PX:
        return np.full(len(ours), np.nan)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _valid_blur(ours), _valid_blur(truth)
    var_a = _valid_blur(ours.square()) - mean_a.square()
    var_b = _valid_blur(truth.square()) - mean_b.square()
    covariance = _valid_blur(ours * truth) - mean_a * mean_b
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    return (above / below).mean(dim=(1, 2)).numpy()


def psnr_db(mse: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors on 0..255, at most `MAX_PSNR_DB`."""
    return (10 * torch.log10(255.0**2 / mse)).clamp(max=MAX_PSNR_DB)


def downscale_area(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, H, W, C] -> [n, h, w, C] by area averaging."""
    return torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def gaussian_taps(sigma: float, radius: int) -> Tensor:
    """Gaussian filter taps that sum to 1, float64 [2 radius + 1]."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = (-(offsets.square()) / (2 * sigma**2)).exp()
    return taps / taps.sum()


def _pair(sr: np.ndarray, gt: np.ndarray, crop_px: int) -> tuple[Tensor, Tensor]:
    if sr.shape != gt.shape:
        raise ValueError(f"images differ in shape: {sr.shape} against {gt.shape}; resize or crop one of them first")
    inside = slice(crop_px, -crop_px or None)
    return luma_y(sr[:, inside, inside]), luma_y(gt[:, inside, inside])


def _valid_blur(field: Tensor) -> Tensor:
    taps = gaussian_taps(_SSIM_SIGMA, _SSIM_RADIUS)
    field = torch.nn.functional.conv2d(field[:, None], taps[None, None, :, None])
    return torch.nn.functional.conv2d(field, taps[None, None, None])[:, 0]
