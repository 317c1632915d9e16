# pyright: strict, reportUnknownMemberType=false
"""Corrects a restored image by the low-quality image it was restored from.

A model that paints from tokens drifts in brightness and colour, and moves edges, where the input still shows what is
right. `wavelet` and `adain` transfer the input's colours as in StableSR (Wang et al. 2024); `back_projection` also
corrects structure that is coarser than an input pixel (Irani and Peleg 1991).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from realsr_hpc.config.learning import ColourFix
from realsr_hpc.restore.image_files import resized

_LEVELS = 5


def fix_colour(image: np.ndarray, lq: np.ndarray, how: ColourFix) -> np.ndarray:
    """The image uint8 [f h, f w, 3], corrected by its input uint8 [h, w, 3].

    back_projection: averaged down, the result shows the input, but for what is finer than an input pixel (noise).
    wavelet: low frequencies from the enlarged input, high frequencies from the image. adain: each channel gets the
    enlarged input's mean and standard deviation.
    """
    if how == "none":
        return image
    ours = _planes(image)
    if how == "back_projection":
        fixed = _back_projected(ours, _planes(lq))
    else:
        theirs = _planes(resized(lq, *image.shape[:2]))
        fixed = ours - low_frequencies(ours) + low_frequencies(theirs) if how == "wavelet" else _adain(ours, theirs)
    return fixed.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _planes(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def _back_projected(ours: Tensor, lq: Tensor) -> Tensor:
    """ours [3, f h, f w] plus the enlarged error of its average against lq [3, h, w].

    The error is smoothed by a Gaussian of one input pixel, so that the input's noise and block edges stay out.
    """
    error = lq - avg_pool2d(ours, ours.shape[-1] // lq.shape[-1])
    taps = torch.exp(-torch.arange(-3, 4.0).square() / 2)
    taps = taps / taps.sum()
    error = conv2d(pad(error[:, None], (3, 3, 3, 3), mode="replicate"), taps.view(1, 1, 7, 1) * taps)  # [3, 1, h, w]
    return ours + interpolate(error, ours.shape[-2:], mode="bicubic", align_corners=False)[:, 0]


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
