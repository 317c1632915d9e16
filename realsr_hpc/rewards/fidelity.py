# pyright: strict, reportUnknownMemberType=false
"""Fidelity reward: whether the final image shows the same content as the LQ image.

It counteracts the generation reward, which alone would also reward invented detail.

- reference=lq (default, needs no truth): the final image is averaged down to the LQ size and compared with the LQ
  image, both slightly smoothed so that noise and block edges weigh less than content.
- reference=lq degradation=known: the final image is first degraded by the operators that made the LQ image (recorded in
  `data`, not estimated), without the noise, so that a blurred LQ image does not reward a blurred result.
- reference=gt: the final image is compared with the truth at full size.

Mapping to [0, 1] by metric: psnr -> (dB - low) / (high - low); l1 -> 1 - mean |difference| / 255; ssim -> negative
values become 0; pyiqa (with reference=gt: LPIPS, DISTS, TOPIQ-FR, ...) -> direction and range from pyiqa's table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.config.reward_options import FidelityOptions
from realsr_hpc.pixels import degraded
from realsr_hpc.quality.psnr_ssim import downscale_area, gaussian_taps, psnr_db, ssim_y
from realsr_hpc.records import Candidate
from realsr_hpc.rewards.base import FINAL_IMAGE, Reward


class FidelityReward(Reward):
    """Closeness of the final image to its LQ image, or to the truth."""

    needs_image = True
    judges = FINAL_IMAGE

    def __init__(self, options: FidelityOptions, device: torch.device | str = "cpu"):
        self.options = options
        self.perceptual = None
        if options.metric == "pyiqa":
            from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics

            self.perceptual = PyiqaMetrics(options.metrics, options.weights_dir, device, mode="FR")

    def to(self, device: torch.device) -> None:
        """Move pyiqa's networks."""
        if self.perceptual is not None:
            self.perceptual.to(device)

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1]; 0 if the truth, or the known degradation, is missing."""
        scores = np.zeros(len(candidates))
        for places, images, references in self._pairs(candidates):
            scores[places] = self._compare(images, references)
        return scores

    def _pairs(self, candidates: Sequence[Candidate]) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
        """For each pair of shapes: indices of its candidates, their images and references, uint8 [n, H, W, 3]."""
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for i, item in enumerate(candidates):
            reference = item.lq if self.options.reference == "lq" else item.gt
            image = self._shown(item)
            if image is not None and reference is not None:
                groups.setdefault(image.shape + reference.shape, []).append((i, image, reference))
        return [
            ([i for i, _, _ in rows], np.stack([image for _, image, _ in rows]), np.stack([ref for _, _, ref in rows]))
            for rows in groups.values()
        ]

    def _shown(self, item: Candidate) -> np.ndarray | None:
        """The image to compare, degraded if configured; None if there is no image or its degradation is unknown."""
        if self.options.degradation == "downscale" or item.image is None:
            return item.image
        if item.gt is not None and item.image.shape != item.gt.shape:
            raise ValueError(
                f"image {item.image.shape[:2]}, truth {item.gt.shape[:2]} px: its degradation is of that size"
            )
        return None if item.operators is None else degraded(item.image, item.operators)

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """Negative mean error in the square of each code, [n, codes]: squared error (psnr) or absolute error (l1).

        The mean of a row ranks rollouts like the metric. None for the other metrics.
        """
        if self.options.metric not in ("psnr", "l1"):
            return None
        grids = [item.trace.images[-1] for item in candidates]
        [shape] = {grid.shape for grid in grids if grid is not None} or {(0, 0)}
        scores = np.full((len(candidates), shape[0] * shape[1]), np.nan)
        for places, images, references in self._pairs(candidates):
            ours, truth = self._compared(images, references)  # [n, h, w, 3]
            errors = (ours - truth).square() if self.options.metric == "psnr" else (ours - truth).abs()
            squares = torch.nn.functional.adaptive_avg_pool2d(errors.mean(-1), shape)  # [n, rows, columns]
            scores[places] = -squares.flatten(1).double().numpy()
        return scores

    def _compare(self, images: np.ndarray, references: np.ndarray) -> np.ndarray:
        if self.perceptual is not None:
            return self.perceptual(list(images), list(references))
        ours, truth = self._compared(images, references)
        if self.options.metric == "l1":
            return (1.0 - (ours - truth).abs().mean(dim=(1, 2, 3)) / 255.0).double().numpy()
        if self.options.metric == "ssim":
            return ssim_y(ours.numpy(), truth.numpy())
        low, high = self.options.psnr_low, self.options.psnr_high
        decibels = psnr_db((ours - truth).square().mean(dim=(1, 2, 3)))
        return ((decibels - low) / (high - low)).clamp(0.0, 1.0).double().numpy()

    def _compared(self, images: np.ndarray, references: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images and references as they are compared: float32 [n, h, w, 3] at the references' size."""
        ours, truth = torch.from_numpy(images).float(), torch.from_numpy(references).float()
        if self.options.reference == "lq":
            ours = smooth(downscale_area(ours, (truth.shape[1], truth.shape[2])), self.options.smooth_px)
            truth = smooth(truth, self.options.smooth_px)
        return ours, truth


def smooth(images: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur of [n, h, w, 3] with replicated borders; sigma 0 changes nothing."""
    if sigma_px == 0:
        return images
    radius = max(1, round(3 * sigma_px))
    # [taps] -> [3, 1, taps]: the same filter for each channel (a depthwise convolution)
    taps = gaussian_taps(sigma_px, radius).to(images).expand(3, 1, -1)
    field = torch.nn.functional.pad(images.permute(0, 3, 1, 2), (radius,) * 4, mode="replicate")
    # [n, 3, H, W]: columns, then rows
    field = torch.nn.functional.conv2d(field, taps[..., None], groups=3)
    return torch.nn.functional.conv2d(field, taps[:, :, None], groups=3).permute(0, 2, 3, 1)
