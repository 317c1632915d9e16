"""The image tokenizer's loss, its metrics, and the grid that shows its reconstructions."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional


def reconstruction_loss(
    output: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"], gradient_weight: float
) -> Float[Tensor, ""]:
    """L1 and 4 L2 of pixels; at sizes 1, 1/2, 1/4 L1 of differences between neighbours; at 1/4, 1/8 L1 (colour)."""
    error = output - target
    loss = error.abs().mean() + 4 * error.square().mean()
    for scale in (1, 2, 4, 8):
        coarse = functional.avg_pool2d(error, scale)
        if scale < 8:
            gradient = coarse.diff(dim=-1).abs().mean() + coarse.diff(dim=-2).abs().mean()
            loss = loss + gradient_weight / 3 * gradient
        if scale > 2:
            loss = loss + 0.5 * coarse.abs().mean()
    return loss


def psnr_db(output: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"]) -> float:
    """PSNR in dB of images in [-1, 1] (peak-to-peak 2), mean over images."""
    errors = (output - target).square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((10 * torch.log10(4 / errors)).mean())


def bicubic(images: Float[Tensor, "B 3 H W"], factor: int) -> Float[Tensor, "B 3 H W"]:
    """Down by `factor` (antialiased) and up again: the baseline that a tokenizer of that stride must beat."""
    height, width = images.shape[-2:]
    small = functional.interpolate(images, (height // factor, width // factor), mode="bicubic", antialias=True)
    return functional.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1)


def write_grid(images: Float[Tensor, "N 3 H W"], columns: int, path: Path) -> None:
    """Write images in [-1, 1] as one PNG, row by row."""
    # images side by side [3, H, columns x W], then the rows below each other [3, rows x H, columns x W]
    rows = [torch.cat(list(images[start : start + columns]), -1) for start in range(0, len(images), columns)]
    pixels = ((torch.cat(rows, -2).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(path)
