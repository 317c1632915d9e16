"""Metrics of a restored image: PSNR-Y, SSIM-Y and NIQE of this project, pyiqa's if staged, reward terms, and texts.

The report states version, colour space and border of every metric. A metric that cannot be computed is listed with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from realsr_hpc.config.metrics import lower_is_better
from realsr_hpc.evaluate.methods import NO_TRACE
from realsr_hpc.evaluate.words import TEXT_NOTES, text_scores
from realsr_hpc.files import first_line
from realsr_hpc.paths import resolve
from realsr_hpc.quality.niqe import NIQEModel, niqe
from realsr_hpc.quality.psnr_ssim import SSIM_MIN_PX, psnr_y, ssim_y
from realsr_hpc.quality.pyiqa_scores import PyiqaScore, open_scores
from realsr_hpc.records import Case, RestoredImage
from realsr_hpc.rewards.degradation import slot_matches
from realsr_hpc.rewards.generation import NIQE_PATH
from realsr_hpc.rewards.mixture import RewardMixture

FID = "fid"
_CANNOT_TAKE = (ValueError, RuntimeError, AssertionError, IndexError)
"""Exceptions of metrics for an image that is too small for their windows or patches."""


@dataclass(frozen=True)
class Judged:
    """Metric values of one image, and the reasons why others could not be computed."""

    values: dict[str, float]
    """By metric; NaN if the image or its reference is missing, or the metric cannot be computed for it."""
    not_computed: dict[str, str]
    """By metric: why it cannot be computed for this image."""


class Metrics:
    """The metrics of an evaluation. `score` measures images; `of_folders` measures whole sets."""

    def __init__(
        self,
        *,
        crop_px: int = 0,
        rewards: RewardMixture | None = None,
        pyiqa: Sequence[str] = (),
        weights_dir: str | None = None,
    ):
        """Load the metrics.

        Args:
            crop_px: border left out of PSNR and SSIM; often set to the upscale factor.
            rewards: reward terms to score as well.
            pyiqa: names of pyiqa's metrics.
            weights_dir: folder of pyiqa's weights; those missing there are listed in `not_computed`.
        """
        self.crop_px, self.rewards = crop_px, rewards
        scores, missing = open_scores(pyiqa, weights_dir)
        self.pyiqa = {_key(score.name): score for score in scores}
        self.not_computed = {_key(name): reason for name, reason in missing.items()}
        self._niqe = NIQEModel.load(resolve(NIQE_PATH))

    def score(self, cases: Sequence[Case], images: Sequence[RestoredImage]) -> list[Judged]:
        """Metric values of each image. ValueError if an image does not have its truth's size."""
        rewards, faults = self._rewards(cases, images)
        rows = []
        for number, (case, item) in enumerate(zip(cases, images, strict=True)):
            measured = Judged({"restored": float(item.image is not None)}, dict(faults))
            self._pixels(case, item.image, measured)
            if item.trace is not NO_TRACE:
                measured.values.update(_words(case, item))
            measured.values.update({name: float(values[number]) for name, values in rewards.items()})
            rows.append(measured)
        return rows

    def lower_is_better(self, name: str) -> bool:
        """Whether lower values of the metric are better."""
        return self.pyiqa[name].lower_is_better if name in self.pyiqa else lower_is_better(name)

    def notes(self, names: Sequence[str]) -> dict[str, str]:
        """Version, colour space and border of each metric, by name."""
        border = f"{self.crop_px} px of border left out" if self.crop_px else "no border left out"
        known = {
            "restored": "1 where the method gave a final image, else 0",
            "psnr_y": f"PSNR in dB on luma (BT.601, 16..235, data range 255), {border}",
            "ssim_y": f"SSIM on the same luma, 11 px Gaussian of sigma 1.5, valid region, {border}",
            "niqe": "NIQE of this project, pristine model recipes/assets/tiny/niqe_pristine.npz (32 px patches): "
            "not comparable with published NIQE",
            "well_formed": "share of traces wholly well formed",
            "slot_accuracy": "share of the five degradation slots named rightly",
            **TEXT_NOTES,
            **{name: score.note for name, score in self.pyiqa.items()},
        }
        return {name: known.get(name, "reward term of the recipe, ungated, in its range") for name in names}

    def _pixels(self, case: Case, image: np.ndarray | None, measured: Judged) -> None:
        if image is None:
            return
        if case.gt is not None:
            if image.shape != case.gt.shape:
                raise ValueError(f"{case.key}: image {image.shape[:2]}, truth {case.gt.shape[:2]} px; they must agree")
            pair = (image[None], case.gt[None], self.crop_px)
            _measure(measured, "psnr_y", lambda: psnr_y(*pair)[0], "nothing is left inside the border")
            _measure(measured, "ssim_y", lambda: ssim_y(*pair)[0], f"a side below {SSIM_MIN_PX} px")
        least = 2 * self._niqe.patch_px
        too_small = (
            f"a side below {least} px" if min(image.shape[:2]) < least else "too flat: its patches hold no detail"
        )
        _measure(measured, "niqe", lambda: niqe([image], self._niqe)[0], too_small)
        per_image: dict[str, PyiqaScore] = {name: score for name, score in self.pyiqa.items() if score.name != FID}
        for name, score in per_image.items():
            _measure(measured, name, partial(score, image, case.gt))

    def _rewards(
        self, cases: Sequence[Case], images: Sequence[RestoredImage]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Values by reward term, and the reason for each term without values.

        For a method without traces, only terms that judge the image are computed.
        """
        if self.rewards is None:
            return {}, {}
        candidates = [case.candidate(item.trace, item.image) for case, item in zip(cases, images, strict=True)]
        has_trace = any(item.trace is not NO_TRACE for item in images)
        scores: dict[str, np.ndarray] = {}
        faults: dict[str, str] = {}
        for name, reward in self.rewards.rewards.items():
            if has_trace or reward.needs_image:
                try:
                    scores[f"reward_{name}"] = reward.score(candidates)
                except _CANNOT_TAKE as error:
                    scores[f"reward_{name}"] = np.full(len(candidates), np.nan)
                    faults[f"reward_{name}"] = first_line(error)
        return scores, faults


def _measure(measured: Judged, name: str, compute: Callable[[], float], if_nan: str = "") -> None:
    """Store a metric's value, or NaN with the reason."""
    try:
        value, why = float(compute()), if_nan
    except _CANNOT_TAKE as error:
        value, why = float("nan"), first_line(error)
    measured.values[name] = value
    if np.isnan(value) and why:
        measured.not_computed[name] = why


def _words(case: Case, item: RestoredImage) -> dict[str, float]:
    slots = float("nan") if case.label is None else float(slot_matches(item.trace.degradation, case.label).mean())
    return {
        "well_formed": float(item.trace.well_formed),
        "slot_accuracy": slots,
        **text_scores(item.trace, case.scene),
    }


def _key(name: str) -> str:
    """The metric's key in the report; pyiqa's NIQE is reported beside this project's."""
    return "niqe_pyiqa" if name == "niqe" else name
