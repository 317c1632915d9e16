"""Numbers of one restored image: ours (PSNR-Y, SSIM-Y, our NIQE), pyiqa's where its weights are staged, rewards, words.

Every metric says its version, colour space and border; one that cannot be computed is named with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realsr_hpc.config.metrics import lower_is_better
from realsr_hpc.evaluate.cases import Case
from realsr_hpc.evaluate.methods import NO_TRACE
from realsr_hpc.evaluate.words import TEXT_NOTES, text_scores
from realsr_hpc.paths import resolve
from realsr_hpc.quality.niqe import NIQEModel, niqe
from realsr_hpc.quality.psnr_ssim import psnr_y, ssim_y
from realsr_hpc.quality.pyiqa_scores import PyiqaScore, open_scores
from realsr_hpc.records import RestoredImage
from realsr_hpc.rewards.base import Candidate
from realsr_hpc.rewards.degradation import slot_matches
from realsr_hpc.rewards.generation import NIQE_PATH
from realsr_hpc.rewards.mixture import RewardMixture

PAPER_PYIQA = {
    "lpips": "LPIPS",
    "dists": "DISTS",
    "fid": "FID",
    "niqe": "NIQE",
    "musiq": "MUSIQ",
    "maniqa-pipal": "MANIQA",
    "clipiqa": "CLIPIQA",
    "topiq_nr": "TOPIQ",
}
"""pyiqa's name -> the column of the paper's table. Its PSNR and SSIM are `psnr_y` and `ssim_y`."""
FID = "fid"


class Metrics:
    """What is measured. `score` gives the numbers of a few images; `of_folders` those of whole sets."""

    def __init__(
        self,
        *,
        crop_px: int = 0,
        rewards: RewardMixture | None = None,
        pyiqa: Sequence[str] = (),
        weights_dir: str | None = None,
    ):
        """crop_px: border left out of PSNR and SSIM (the field often takes the upscale). pyiqa: its metrics' names."""
        self.crop_px, self.rewards = crop_px, rewards
        scores, missing = open_scores(pyiqa, weights_dir)
        self.pyiqa = {_key(score.name): score for score in scores}
        self.not_computed = {_key(name): reason for name, reason in missing.items()}
        self._niqe = NIQEModel.load(resolve(NIQE_PATH))

    def score(self, cases: Sequence[Case], images: Sequence[RestoredImage]) -> list[dict[str, float]]:
        """Numbers of each image; NaN where it, or what it is measured against, is missing.

        ValueError when an image has not its truth's size.
        """
        rewards = self._rewards(cases, images)
        rows = []
        for number, (case, item) in enumerate(zip(cases, images, strict=True)):
            row = {"restored": float(item.image is not None)} | self._pixels(case, item.image)
            if item.trace is not NO_TRACE:
                row |= _words(case, item)
            rows.append(row | {name: float(values[number]) for name, values in rewards.items()})
        return rows

    def lower_is_better(self, name: str) -> bool:
        """The direction of a metric."""
        return self.pyiqa[name].lower_is_better if name in self.pyiqa else lower_is_better(name)

    def notes(self, names: Sequence[str]) -> dict[str, str]:
        """What exactly each metric is."""
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

    def _pixels(self, case: Case, image: np.ndarray | None) -> dict[str, float]:
        if image is None:
            return {}
        found: dict[str, float] = {}
        if case.gt is not None:
            if image.shape != case.gt.shape:
                raise ValueError(f"{case.key}: image {image.shape[:2]}, truth {case.gt.shape[:2]} px; they must agree")
            found["psnr_y"] = float(psnr_y(image[None], case.gt[None], self.crop_px)[0])
            found["ssim_y"] = float(ssim_y(image[None], case.gt[None], self.crop_px)[0])
        found["niqe"] = float(niqe([image], self._niqe)[0])
        per_image: dict[str, PyiqaScore] = {name: score for name, score in self.pyiqa.items() if score.name != FID}
        return found | {name: score(image, case.gt) for name, score in per_image.items()}

    def _rewards(self, cases: Sequence[Case], images: Sequence[RestoredImage]) -> Mapping[str, np.ndarray]:
        """Reward terms; of a method without traces only those that look at the image."""
        if self.rewards is None:
            return {}
        candidates = [
            Candidate(item.trace, item.image, case.lq, case.gt, case.label, case.scene, case.operators)
            for case, item in zip(cases, images, strict=True)
        ]
        has_trace = any(item.trace is not NO_TRACE for item in images)
        return {
            f"reward_{name}": reward.score(candidates)
            for name, reward in self.rewards.rewards.items()
            if has_trace or reward.needs_image
        }


def _words(case: Case, item: RestoredImage) -> dict[str, Any]:
    slots = float("nan") if case.label is None else float(slot_matches(item.trace.degradation, case.label).mean())
    return {
        "well_formed": float(item.trace.well_formed),
        "slot_accuracy": slots,
        **text_scores(item.trace, case.scene),
    }


def _key(name: str) -> str:
    """pyiqa's NIQE stands beside ours."""
    return "niqe_pyiqa" if name == "niqe" else name
