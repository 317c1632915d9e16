"""Detects stripes and grids by the share of an image's fine detail that is concentrated at single frequencies.

A policy that maximises a no-reference expert converges to patterns that the expert takes for detail: stripes, grids, or
one repeated code. Their spectrum has a few sharp peaks. The spectrum of a photograph is smooth; straight edges cause
lines in it, but a bin on a line has high neighbours and a peak has none.

The power spectra of overlapping windows, each normalised by the window's energy, are averaged and whitened (spectra of
photographs decrease with the square of the frequency). The share is the power at periods up to 8 px that exceeds all
bins at a distance of three. docs/rewards.md has the shares measured on photographs and on striped images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.quality.batching import same_shapes
from realsr_hpc.quality.psnr_ssim import luma_y

HARMLESS_SHARE, WORTHLESS_SHARE = 0.1, 0.4
"""An image up to the first share keeps its reward; from the second share on it loses all of it."""
_LONGEST_PERIOD_PX = 8
_FLOOR = 16.0
"""Variance (in units of 0..255 luma) below which a window counts less, because patterns in it are invisible."""
_STANDS_OUT = 2.0
"""A peak is at least this many times the highest bin at a distance of three."""
_RING = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4) if max(abs(dy), abs(dx)) == 3]
"""Bins at a distance of three, outside the main lobe of the Hann window, which is two bins wide."""


def stripe_guard(images: Sequence[np.ndarray], truths: Sequence[np.ndarray | None] | None = None) -> np.ndarray:
    """Factors [n] in 0..1 for RGB uint8 images [H, W, 3]: 1 for photographs, 0 for stripes.

    If the truth is known, an image may have the same share of stripes as its truth (bricks, a mesh, a blind).
    """
    allowed = np.full(len(images), HARMLESS_SHARE)
    known = [(place, truth) for place, truth in enumerate(truths or ()) if truth is not None]
    if known:
        places = [place for place, _ in known]
        allowed[places] = np.maximum(HARMLESS_SHARE, stripe_share([truth for _, truth in known]))
    return 1.0 - np.clip((stripe_share(images) - allowed) / (WORTHLESS_SHARE - HARMLESS_SHARE), 0.0, 1.0)


def stripe_share(images: Sequence[np.ndarray]) -> np.ndarray:
    """Share [n] in 0..1 of the fine detail that lies in sharp peaks of the spectrum; 0 for images below 32 px."""
    shares = np.zeros(len(images))
    for places, stack in same_shapes(images):
        if min(stack.shape[1:3]) >= 32:
            shares[places] = _share(_spectrum(luma_y(stack).float())).numpy()
    return shares


def _spectrum(luma: Tensor) -> Tensor:
    """Whitened mean power spectrum [n, side, side] over windows of luma [n, H, W]."""
    side = 64 if min(luma.shape[1:]) >= 128 else 32
    windows = luma.unfold(1, side, side // 2).unfold(2, side, side // 2)
    windows = windows - windows.mean(dim=(3, 4), keepdim=True)
    taper = torch.hann_window(side, periodic=True)
    energy = windows.square().mean(dim=(3, 4), keepdim=True) + _FLOOR
    power = torch.fft.fft2(windows * taper[:, None] * taper).abs().square() / energy
    frequency = torch.fft.fftfreq(side)
    return power.mean(dim=(1, 2)) * (frequency[:, None].square() + frequency.square())


def _share(power: Tensor) -> Tensor:
    around = torch.stack([power.roll(shift, dims=(1, 2)) for shift in _RING]).amax(dim=0)
    frequency = torch.fft.fftfreq(power.shape[1]).abs()
    fine = torch.maximum(frequency[:, None], frequency.expand_as(power[0])) >= 1 / _LONGEST_PERIOD_PX
    peaks = (power - _STANDS_OUT * around).clamp(min=0.0) * fine
    return (peaks.sum(dim=(1, 2)) / (power * fine).sum(dim=(1, 2)).clamp(min=1e-9)).double()
