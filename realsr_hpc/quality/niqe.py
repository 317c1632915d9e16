"""NIQE (Mittal, Soundararajan, Bovik 2013), implemented from the paper: batched, float64, with its own pristine model.

Natural scene statistics of small patches: mean-subtracted contrast-normalised luminance and products of neighbouring
coefficients, fitted by asymmetric generalised Gaussians on two scales (2 x 18 features). The score is the distance
between the Gaussian of an image's patch features and that of pristine photographs; 0 is best, and there is no upper
bound. The paper uses patches of 96 px; images of 128 px need smaller ones, so the patch size is part of the model.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.quality.batching import same_shapes

NUM_FEATURES = 36
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
_SHAPES = torch.arange(0.2, 10.0005, 0.001, dtype=torch.float64)
"""Candidate shape parameters of the fits, as in the authors' release."""
_DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""Exceptions of reading a damaged .npz."""


@dataclass(frozen=True)
class NIQEModel:
    """The pristine Gaussian and the patch geometry it was fitted with."""

    mean: np.ndarray
    """[36]."""
    covariance: np.ndarray
    """[36, 36]."""
    patch_px: int
    stride_px: int

    def save(self, path: Path) -> None:
        """Write as .npz."""
        np.savez(path, mean=self.mean, covariance=self.covariance, patch_px=self.patch_px, stride_px=self.stride_px)

    @classmethod
    def load(cls, path: Path) -> NIQEModel:
        """Read what `save` wrote. Raises ValueError if the file is missing, damaged or has other shapes."""
        if not path.is_file():
            raise ValueError(f"NIQE model {path} not found; make it with `realsr-hpc fit-experts only=niqe`")
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                model = cls(held["mean"], held["covariance"], int(held["patch_px"]), int(held["stride_px"]))
        except _DAMAGED as error:
            raise ValueError(f"NIQE model {path} is damaged ({error}); make it with realsr-hpc fit-experts") from None
        if model.mean.shape != (NUM_FEATURES,) or model.covariance.shape != (NUM_FEATURES, NUM_FEATURES):
            raise ValueError(f"NIQE model {path} has mean {model.mean.shape}; it must be ({NUM_FEATURES},)")
        if not (8 <= model.patch_px <= 1024 and 1 <= model.stride_px <= 1024):
            raise ValueError(f"NIQE model {path} has patches of {model.patch_px} px at {model.stride_px}; give another")
        if not (np.isfinite(model.mean).all() and np.isfinite(model.covariance).all()):
            raise ValueError(f"NIQE model {path} holds NaN or infinite numbers; make it with realsr-hpc fit-experts")
        return model


def niqe(images: Sequence[np.ndarray], model: NIQEModel, device: torch.device | str = "cpu") -> np.ndarray:
    """NIQE [n] of RGB uint8 images [H, W, 3]; lower is better. NaN for images smaller than two patches."""
    scores = np.full(len(images), np.nan)
    for places, stack in same_shapes(images):
        if min(stack.shape[1:3]) >= 2 * model.patch_px:
            features, _ = patch_features(luminance(stack).to(device), model.patch_px, model.stride_px)
            scores[places] = _distance(features, model)
    return scores


def luminance(images: np.ndarray) -> Tensor:
    """Rounded luma (weights 0.299, 0.587, 0.114) of RGB uint8 [n, H, W, 3]: float64 [n, H, W] in 0..255."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return (torch.from_numpy(np.array(images)).double() @ weights).round()


def patch_features(luma: Tensor, patch_px: int, stride_px: int) -> tuple[Tensor, Tensor]:
    """Features [n, patches, 36] of luma [n, H, W] in 0..255, and each patch's sharpness [n, patches].

    Sharpness is the mean local standard deviation at full size; pristine patches are selected by it.
    """
    # crop to whole patches
    keep = [(size - patch_px) // stride_px * stride_px + patch_px for size in luma.shape[1:]]
    luma = luma[:, : keep[0], : keep[1]]
    coefficients, deviation = normalise(luma)
    sharpness = _patches(deviation, patch_px, stride_px).mean(dim=(2, 3))
    # the second 18 features are those of the image at half size, in patches of half the side
    half, _ = normalise(halve(luma))
    both = [
        _features(_patches(coefficients, patch_px, stride_px)),
        _features(_patches(half, patch_px // 2, stride_px // 2)),
    ]
    return torch.cat(both, dim=-1), sharpness


def normalise(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean-subtracted contrast-normalised coefficients and the local standard deviation, both [n, H, W]."""
    mean = _blur(luma)
    deviation = (_blur(luma.square()) - mean.square()).abs().sqrt()
    return (luma - mean) / (deviation + 1.0), deviation


def halve(luma: Tensor) -> Tensor:
    """Luma [n, H, W], H and W even, at half the size: antialiased bicubic (MATLAB's, a = -0.5), mirrored borders."""
    taps = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=luma.dtype) / 256.0
    return _separable(luma, taps, stride=2, mode="symmetric")


def fit_pristine(lumas: Sequence[Tensor], patch_px: int, stride_px: int, sharp_share: float = 0.75) -> NIQEModel:
    """Fit the model on pristine luma images, each [H, W].

    sharp_share: of each image, use patches that are sharper than this share of its sharpest patch. Raises ValueError if
    fewer than two patches qualify.
    """
    chosen = []
    for luma in lumas:
        features, sharpness = patch_features(luma[None], patch_px, stride_px)
        chosen.append(features[sharpness > sharp_share * sharpness.max()])
    rows = torch.cat(chosen)
    rows = rows[rows.isfinite().all(dim=1)]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} sharp patches in {len(lumas)} images; give more images or lower sharp_share")
    return NIQEModel(rows.mean(dim=0).numpy(), torch.cov(rows.T).numpy(), patch_px, stride_px)


def fit_aggd(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left scale and right scale of asymmetric generalised Gaussians, fitted by moments over the last dim.

    The scale of a side without values (in a flat patch) is NaN; `niqe`'s covariance leaves such patches out.
    """
    squares = values.square()
    # standard deviations of the negative and of the positive values
    below = values.clamp(max=0.0).square().sum(-1)
    left_std = (below / (values < 0).sum(-1)).sqrt()
    right_std = ((squares.sum(-1) - below) / (values > 0).sum(-1)).sqrt()
    skew = left_std / right_std
    ratio = values.abs().mean(-1).square() / squares.mean(-1)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew.square() + 1).square()
    shape = _shape_of(ratio)
    scale = (0.5 * (torch.lgamma(1 / shape) - torch.lgamma(3 / shape))).exp()
    return shape, left_std * scale, right_std * scale


def _shape_of(ratio: Tensor) -> Tensor:
    """The candidate shape with the nearest moment ratio, which increases with the shape. For NaN the first candidate,
    as in MATLAB."""
    shapes = _SHAPES.to(ratio.device)
    table = (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()
    above = torch.searchsorted(table, ratio.nan_to_num(0.5).contiguous()).clamp(1, len(table) - 1)
    nearer_below = (ratio - table[above - 1]).abs() <= (table[above] - ratio).abs()
    shape = shapes[torch.where(nearer_below, above - 1, above)]
    return torch.where(ratio.isnan(), shapes[0], shape)


def _features(patches: Tensor) -> Tensor:
    """Features [n, patches, 18] of normalised patches [n, patches, p, p]."""
    shape, left, right = fit_aggd(patches.flatten(2))
    columns = [shape, (left + right) / 2]
    # products of neighbours in four directions; rolled within each patch
    for shift in _SHIFTS:
        shape, left, right = fit_aggd((patches * patches.roll(shift, dims=(2, 3))).flatten(2))
        mean = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
        columns += [shape, mean, left, right]
    return torch.stack(columns, dim=-1)


def _distance(features: Tensor, model: NIQEModel) -> np.ndarray:
    """Distance [n] between the Gaussians of features [n, patches, 36] and of the model."""
    mean, covariance = (torch.from_numpy(part).to(features.device) for part in (model.mean, model.covariance))
    scores = []
    for patches in features.where(features.isfinite(), torch.nan):
        rows = patches[patches.isfinite().all(dim=1)]
        if len(rows) < 2:
            scores.append(np.nan)
            continue
        # As in the authors' release, the finite features of a partly flat patch count for the mean.
        gap = patches.nanmean(dim=0) - mean
        inverse = torch.linalg.pinv((torch.cov(rows.T) + covariance) / 2, hermitian=True)
        scores.append(float((gap @ (inverse @ gap)).sqrt()))
    return np.array(scores)


def _patches(field: Tensor, size: int, stride: int) -> Tensor:
    """Patches [n, patches, size, size] of a field [n, H, W]."""
    return field.unfold(1, size, stride).unfold(2, size, stride).flatten(1, 2)


def _every(field: Tensor, dim: int, stride: int) -> Tensor:
    return field[:, ::stride] if dim == 1 else field[:, :, ::stride]


def _blur(field: Tensor) -> Tensor:
    """7 px Gaussian of sigma 7/6, borders replicated."""
    offsets = torch.arange(-3, 4, dtype=field.dtype)
    taps = (-(offsets.square()) / (2 * (7 / 6) ** 2)).exp()
    return _separable(field, taps / taps.sum(), stride=1, mode="replicate")


def _separable(field: Tensor, taps: Tensor, stride: int, mode: str) -> Tensor:
    """Filter [n, H, W] by the same taps along both dims."""
    pad = (len(taps) - stride) // 2
    for dim in (1, 2):
        size = field.shape[dim]
        places = torch.arange(-pad, size + pad, device=field.device)
        mirrored = torch.where(places < 0, -1 - places, torch.where(places >= size, 2 * size - 1 - places, places))
        places = mirrored if mode == "symmetric" else places.clamp(0, size - 1)
        padded = field.index_select(dim, places)
        length = (padded.shape[dim] - len(taps)) // stride + 1
        # Sliced sums: several times faster on the CPU than a float64 convolution.
        shifted = [padded.narrow(dim, i, (length - 1) * stride + 1) for i in range(len(taps))]
        steps = [part if stride == 1 else _every(part, dim, stride) for part in shifted]
        field = torch.zeros_like(steps[0])
        for tap, part in zip(taps.tolist(), steps, strict=True):
            field.add_(part, alpha=tap)
    return field
