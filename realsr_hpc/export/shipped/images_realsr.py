"""Images before and after the model, for an export of realsr_hpc: any file to RGB, results corrected by their input."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

COLOUR_FIXES = ("none", "wavelet", "adain", "back_projection")


def corrected(restored, image, how, tile_px):
    """float [3, S, S] in 0..255, corrected by the RGB image it was restored from; see `fix_colour` of realsr_hpc.

    Of a larger image than the model restores, only what is left of it at `tile_px` corrects.
    """
    if how == "none":
        return restored
    side = restored.shape[-1]
    if how == "back_projection":
        lq = torch.from_numpy(np.array(image)).movedim(-1, 0).float().to(restored.device)
        sizes = [min(length, tile_px) for length in lq.shape[-2:]]
        error = F.adaptive_avg_pool2d(lq, sizes) - F.adaptive_avg_pool2d(restored, sizes)
        taps = torch.exp(-torch.arange(-3, 4.0).square() / 2).to(error.device)
        taps = taps / taps.sum()
        error = F.conv2d(F.pad(error[:, None], (3, 3, 3, 3), mode="replicate"), taps.view(1, 1, 7, 1) * taps)
        fixed = restored + F.interpolate(error, (side, side), mode="bicubic", align_corners=False)[:, 0]
    else:
        enlarged = image.resize((side, side), Image.Resampling.BICUBIC)
        reference = torch.from_numpy(np.array(enlarged)).movedim(-1, 0).float().to(restored.device)
        if how == "wavelet":
            fixed = restored - low_frequencies(restored) + low_frequencies(reference)
        else:
            (mean, spread), (wanted_mean, wanted_spread) = (
                (x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True, correction=0)) for x in (restored, reference)
            )
            fixed = (restored - mean) / spread.clamp(min=1e-5) * wanted_spread + wanted_mean
    return fixed.round().clamp(0, 255)


def low_frequencies(planes):
    """What five levels of the à trous transform leave of [3, S, S]."""
    taps = torch.tensor([0.25, 0.5, 0.25], device=planes.device)
    for spread in (1, 2, 4, 8, 16):
        for kernel, border in ((taps.view(1, 1, 3, 1), (0, 0, spread, spread)),
                               (taps.view(1, 1, 1, 3), (spread, spread, 0, 0))):  # fmt: skip
            planes = F.conv2d(F.pad(planes[:, None], border, mode="replicate"), kernel, dilation=spread)[:, 0]
    return planes


def as_rgb(image):
    """Upright 8-bit RGB: 16-bit grey is scaled, where `convert` cuts it off; floats are 0..1, 0..255 or 0..65535."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        highest = values[np.isfinite(values)].max(initial=0.0)
        tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        top = next((top for top in tops if highest <= top), None)
        if top is None:
            raise ValueError(f"image of mode {image.mode} with values up to {highest:g}; scale it to 0..{tops[-1]:g}")
        scaled = np.nan_to_num(values / top * 255.0, nan=0.0, posinf=255.0, neginf=0.0)
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
