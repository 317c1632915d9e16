"""Computes how much of a drawn degradation is still visible in the LQ image, from its parameters alone.

Blur is exact for the linear part: the gains of every blur, resize and sinc filter are multiplied at the LQ image's
frequencies. Noise and JPEG's changes are expected values for a photograph of usual contrast (`SIGNAL_RMS`, with power
falling with the square of the frequency): the spectra of the photograph, of both noises and of JPEG's errors pass
through the operators in their order. docs/data.md compares the result with chains that are run with and without noise
or JPEG.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from realsr_hpc.config.schema import VISIBLE_EDGES
from realsr_hpc.data.degradation import (
    PRESETS,
    DegradationParameters,
    StageParameters,
    Stream,
    generator,
    sample_degradation,
)
from realsr_hpc.data.operators import operators_of
from realsr_hpc.data.spectra import (
    CENTRES,
    folding,
    jpeg_steps,
    kernel_gains,
    kernel_power,
    resize_gain,
    rounding_loss,
)
from realsr_hpc.records import JPEG, Blur, Operators, ResizeTo

SIGNAL_RMS = 50.0
"""Standard deviation of a photograph's brightness, on 0..255."""
USUAL_BRIGHTNESS = 115.0
"""Mean level of a photograph (0..255), if none is given."""
PHOTONS = 256.0
"""Poisson noise: number of levels of an image that uses most of them."""
LUMA_SHARE = 0.447
"""Share of independent noise in R, G, B that is brightness: the sum of the squared luma weights."""
CONTRASTS = np.array([0.05, 0.45, 2.5])[:, None, None]
"""Local variance of an image's flat, middle and busy thirds over the mean: JPEG rounds most of a flat block to zero."""
EDGE_DRAWS = 600
Edges = tuple[float, float]

_SIGNAL, _NOISE, _COLOUR_NOISE, _ERROR, _COLOUR_ERROR = range(5)
_FALLING = 1.0 / (CENTRES[:, None] ** 2 + CENTRES**2)


@dataclass(frozen=True)
class Visible:
    """Numbers of one LQ image; each grows with the degradation. Named as in `config.schema.VISIBLE_EDGES`."""

    blur_px: float
    """Sigma, in LQ pixels, of the Gaussian blur whose total squared gain is that of the chain of operators below the LQ
    image's Nyquist frequency; 0.28 means no blur."""
    noise_rms: float
    """Noise in the LQ image: RMS over R, G, B, on 0..255."""
    compression_rms: float
    """Compression in the LQ image: RMS of the JPEGs' changes after the later operators, on 0..255."""


def visible(
    parameters: DegradationParameters,
    operators: Operators,
    gt_px: int,
    lq_px: int,
    brightness: float = USUAL_BRIGHTNESS,
) -> Visible:
    """Visible blur, noise and compression of one LQ image.

    operators: those of `parameters`. brightness: the photograph's mean level in 0..255, on which Poisson noise depends.
    """
    spectra = _tracked(parameters, operators, gt_px, brightness)
    rms = np.sqrt(spectra.mean((1, 2)))
    return Visible(
        blur_px=_blur_px(operators, gt_px, lq_px),
        noise_rms=math.hypot(rms[_NOISE], rms[_COLOUR_NOISE]),
        compression_rms=math.hypot(rms[_ERROR], rms[_COLOUR_ERROR]),
    )


@lru_cache
def tercile_edges(preset: str, gt_px: int, upscale: int) -> dict[str, Edges]:
    """Terciles of every number over `EDGE_DRAWS` draws of the preset at these sizes; the draws are fixed."""
    drawn = [
        sample_degradation(generator(0, index, Stream.DEGRADATION), PRESETS[preset], gt_px, upscale)
        for index in range(EDGE_DRAWS)
    ]
    lq_px = gt_px // upscale
    seen = [visible(parameters, operators_of(parameters, lq_px), gt_px, lq_px) for parameters in drawn]
    edges = {}
    for name in VISIBLE_EDGES:
        low, high = np.quantile([getattr(one, name) for one in seen], [1 / 3, 2 / 3])
        edges[name] = (float(low), float(high))
    return edges


def _blur_px(operators: Operators, gt_px: int, lq_px: int) -> float:
    gain, side = np.ones((2, len(CENTRES), len(CENTRES))), gt_px
    for operator in operators:
        # The LQ image's frequencies in radians per pixel of the current intermediate image.
        here = CENTRES * lq_px / side
        match operator:
            case Blur():
                gain = gain * kernel_gains(operator.kernel, here)
            case ResizeTo():
                # Frequencies above the Nyquist frequency of a smaller intermediate image are lost.
                line = resize_gain(here, side, operator.side_px, operator.mode) * (here < math.pi)
                side = operator.side_px
                line = line * (CENTRES * lq_px / side < math.pi)
                gain = gain * np.outer(line, line)
    return 1.0 / math.sqrt(4 * math.pi * max(float((gain**2).mean()), 1e-4))


def _tracked(
    parameters: DegradationParameters, operators: Operators, gt_px: int, brightness: float
) -> Float64[np.ndarray, "5 8 8"]:
    """Spectra of signal, luma noise, chroma noise, luma error and chroma error after all operators."""
    spectra, side = np.zeros((5, *_FALLING.shape)), gt_px
    spectra[_SIGNAL] = SIGNAL_RMS**2 * _FALLING / _FALLING.mean()
    noisy = [parameters.first, parameters.second]
    for operator in operators:
        match operator:
            case Blur():
                spectra = spectra * kernel_power(operator.kernel)
            case ResizeTo():  # noise is added after the resize of each stage; the last resize has none
                fold = folding(side, operator.side_px, operator.mode)
                spectra, side = fold @ spectra @ fold.T, operator.side_px
                if noisy:
                    _add_noise(spectra, noisy.pop(0), brightness)
            case JPEG():
                _round(spectra, operator.quality)
    return spectra


def _add_noise(spectra: np.ndarray, stage: StageParameters, brightness: float) -> None:
    variance = stage.noise_level**2 * (1.0 if stage.noise == "gaussian" else 255.0 * brightness / PHOTONS)
    luma = 1.0 if stage.gray else LUMA_SHARE
    spectra[_NOISE] += luma * variance
    spectra[_COLOUR_NOISE] += (1.0 - luma) * variance


def _round(spectra: np.ndarray, quality: int) -> None:
    """JPEG: the part of noise and signal that rounding removes becomes error. Chroma is subsampled first (4:2:0)."""
    luma_steps, colour_steps = jpeg_steps(quality)
    variance = spectra[_SIGNAL] * CONTRASTS + spectra[_NOISE] + spectra[_ERROR]
    loss = rounding_loss(variance, luma_steps)
    error, kept = (loss * variance).mean(0), 1.0 - loss.mean(0)
    spectra[_NOISE] *= kept
    spectra[_ERROR] = spectra[_ERROR] * kept + error
    half = len(CENTRES) // 2
    colour = spectra[_COLOUR_NOISE, :half, :half] + CONTRASTS[0] * spectra[_SIGNAL, :half, :half]
    kept = np.zeros_like(kept)
    # At half the size frequencies double, and a pixel averages four pixels: steps count half.
    kept[:half, :half] = 1.0 - rounding_loss(colour, colour_steps[::2, ::2] / 2)
    spectra[_COLOUR_ERROR] = spectra[_COLOUR_ERROR] * kept + spectra[_COLOUR_NOISE] * (1.0 - kept)
    spectra[_COLOUR_NOISE] *= kept
