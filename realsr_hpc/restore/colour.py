# pyright: strict, reportUnknownMemberType=false
"""Transfers the input's colours to a restored image, by wavelets or AdaIN as in StableSR (Wang et al. 2024)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from realsr_hpc.config.restoring import ColourFix

_LEVELS = 5


def fix_colour(image: np.ndarray, reference: np.ndarray, how: ColourFix) -> np.ndarray:
    """The image, uint8 [H, W, 3], with the colours of `reference`, which is the input resized to the same shape.

    wavelet: low frequencies from the reference, high frequencies from the image. adain: each channel gets the
    reference's mean and standard deviation.
    """
    if how == "none":
        return image
    # uint8 [H, W, 3] -> float32 [3, H, W] in 0..255
    ours, theirs = (torch.from_numpy(np.array(x)).permute(2, 0, 1).float() for x in (image, reference))
    fixed = ours - low_frequencies(ours) + low_frequencies(theirs) if how == "wavelet" else _adain(ours, theirs)
    return fixed.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def low_frequencies(planes: Tensor) -> Tensor:
    """Low-pass residual [3, H, W] after five levels of the à trous wavelet transform.

    Each level filters rows and columns with the taps 1/4, 1/2, 1/4, dilated by 1, 2, 4, 8 and 16 px.
    """
    taps = torch.tensor([0.25, 0.5, 0.25])
    for level in range(_LEVELS):
        spread = 2**level
        for kernel, border in (
            (taps.view(1, 1, 3, 1), (0, 0, spread, spread)),
            (taps.view(1, 1, 1, 3), (spread, spread, 0, 0)),
        ):
            # [3, H, W] as three images of one channel: [3, 1, H, W]
            planes = conv2d(pad(planes[:, None], border, mode="replicate"), kernel, dilation=spread)[:, 0]
    return planes


def _adain(ours: Tensor, theirs: Tensor) -> Tensor:
    (mean, spread), (wanted_mean, wanted_spread) = _moments(ours), _moments(theirs)
    return (ours - mean) / spread.clamp(min=1e-5) * wanted_spread + wanted_mean


def _moments(planes: Tensor) -> tuple[Tensor, Tensor]:
    return planes.mean((1, 2), keepdim=True), planes.std((1, 2), keepdim=True, correction=0)
