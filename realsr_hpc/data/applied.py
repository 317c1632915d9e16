"""Labels for the applied degradation (`degradation.labels=applied`), whether or not it is still visible.

A number is light, medium or heavy by the terciles of the range it was drawn from, unless the recipe sets its own edges.
If both degradation stages apply an operation, the heavier word is used; a stage without blur adds none. The severity of
a Gaussian-like blur is the mean of its two sigmas; for a sinc's cut-off and for JPEG quality, lower is heavier.
"""

from __future__ import annotations

from collections.abc import Mapping

from realsr_hpc.data.degradation import DegradationParameters, Preset, Range, StageParameters, sinc_omega_range
from realsr_hpc.data.kernels import KernelParameters
from realsr_hpc.records import LEVELS, DegradationLabel

LOWER_IS_HEAVIER = frozenset({"jpeg_quality", "sinc_omega"})
Edges = Mapping[str, tuple[float, float]]
"""Edges between light and medium, and medium and heavy; keys as in `config.schema.APPLIED_EDGES`."""


def applied_words(parameters: DegradationParameters, preset: Preset, severity_edges: Edges) -> DegradationLabel:
    """The five words of one sample.

    preset: the one that the parameters were drawn from; terciles of its ranges separate the levels.
    """
    stages = (
        ("first", parameters.first, preset.first),
        ("second", parameters.second, preset.second),
    )
    # severities of both stages; the strongest one decides the word
    blur, noise, compression = [0], [0], [0]
    for name, stage, ranges in stages:
        if stage.blur is not None:
            blur.append(_blur_severity(name, stage.blur, ranges.blur_sigma, severity_edges))
        noise.append(_noise_severity(name, stage, ranges.gaussian_range, ranges.poisson_range, severity_edges))
        compression.append(_severity("jpeg_quality", name, stage.jpeg_quality, ranges.jpeg_range, severity_edges))
    return DegradationLabel(
        blur=LEVELS[max(blur)],
        resize1=parameters.first.resize,
        noise=LEVELS[max(noise)],
        compression=LEVELS[max(compression)],
        resize2=parameters.second.resize,
    )


def _blur_severity(stage: str, blur: KernelParameters, sigma: Range, edges: Edges) -> int:
    if blur.shape == "sinc":
        return _severity("sinc_omega", stage, blur.omega, sinc_omega_range(blur.size_px), edges)
    return _severity("blur_sigma", stage, (blur.sigma_x + blur.sigma_y) / 2, sigma, edges)


def _noise_severity(name: str, stage: StageParameters, gaussian: Range, poisson: Range, edges: Edges) -> int:
    if stage.noise == "gaussian":
        return _severity("gaussian_sigma", name, stage.noise_level, gaussian, edges)
    return _severity("poisson_level", name, stage.noise_level, poisson, edges)


def _severity(number: str, stage: str, value: float, drawn_from: Range, edges: Edges) -> int:
    """Level of a value: 0 light, 1 medium, 2 heavy."""
    low, high = drawn_from
    first, second = edges.get(f"{number}_{stage}", (low + (high - low) / 3, high - (high - low) / 3))
    above = int(value >= first) + int(value >= second)
    return 2 - above if number in LOWER_IS_HEAVIER else above
