"""The only place that knows pyiqa (extra `iqa`, licence PolyForm-Noncommercial: read it before commercial use).

Metrics by name; direction and range come from pyiqa's own table and are turned into [0, 1], higher better. pyiqa
would download weights and unpickle them unchecked; here nothing is downloaded: weights lie in a folder whose
SHA256SUMS is verified first, laid out as pyiqa looks for them:

    weights_dir/SHA256SUMS                      sha256sum's own format, paths from weights_dir
    weights_dir/hub/pyiqa/*.pth | *.mat         pyiqa's own heads
    weights_dir/hub/checkpoints/*.pth           torchvision backbones
    weights_dir/hub/clip/*.pt                   CLIP
    weights_dir/huggingface/...                 timm backbones (HF_HOME)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from realsr_hpc.config.paths import resolve
from realsr_hpc.rewards.base import same_shapes

_LIBRARIES: list[Any] = []
"""Operator declarations live as long as the objects that made them."""


class PyiqaMetrics:
    """Mean of some pyiqa metrics, each in [0, 1], higher better: without a reference (`NR`) or with one (`FR`)."""

    def __init__(
        self,
        names: Sequence[str],
        weights_dir: str | None = None,
        device: str = "cpu",
        mode: Literal["NR", "FR"] = "NR",
    ):
        pyiqa = load_pyiqa(resolve(weights_dir) if weights_dir else None)
        self.metrics = [(*normalisation(name, mode), _create(pyiqa, name, device)) for name in names]

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Scores [n] of RGB uint8 images [H, W, 3], against references of the same shapes with `FR`."""
        scores = np.zeros(len(images))
        for places, stack in same_shapes(images):
            inputs = [_pixels(stack)]
            if references is not None:
                inputs.append(_pixels(np.stack([references[place] for place in places])))
            for low, high, lower_better, metric in self.metrics:
                raw = metric(*inputs).double().reshape(-1).cpu().numpy()
                unit = np.clip((raw - low) / (high - low), 0.0, 1.0)
                scores[places] += (1.0 - unit if lower_better else unit) / len(self.metrics)
        return scores


OPEN_RANGES = {"niqe": (0.0, 20.0), "ilniqe": (0.0, 100.0), "brisque": (0.0, 100.0), "piqe": (0.0, 100.0)}
"""Where pyiqa's table leaves an end open, the range that is used here, in the metric's own unit."""


def _pixels(stack: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(stack)).permute(0, 3, 1, 2).float() / 255.0


def normalisation(name: str, mode: Literal["NR", "FR"] = "NR") -> tuple[float, float, bool]:
    """Low and high end and whether lower is better, from pyiqa's table; `load_pyiqa` must have run.

    Raises ValueError for an unknown metric, one of the other mode, or one without a usable range.
    """
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    if name not in DEFAULT_CONFIGS:
        raise ValueError(f"pyiqa has no metric {name!r}; it has {', '.join(sorted(DEFAULT_CONFIGS))}")
    entry = DEFAULT_CONFIGS[name]
    if entry.get("metric_mode") != mode:
        other = {"NR": "needs a reference: use fidelity", "FR": "takes no reference: use generation"}[mode]
        raise ValueError(f"pyiqa metric {name!r} {other}")
    ends = OPEN_RANGES.get(name) or tuple(_number(end) for end in entry.get("score_range", ",").split(","))
    low, high = ends if len(ends) == 2 else (None, None)
    if low is None or high is None or low >= high:
        raise ValueError(f"pyiqa gives no range for {name!r} ({entry.get('score_range')}); add one to OPEN_RANGES")
    return low, high, bool(entry.get("lower_better", False))


def load_pyiqa(weights_dir: Path | None) -> Any:
    """Import pyiqa offline, after verifying the staged weights.

    Raises ValueError when the extra is not installed, or a staged file is missing or differs.
    """
    if importlib.util.find_spec("pyiqa") is None:
        raise ValueError("expert=pyiqa needs the extra `iqa`: pip install 'realsr-hpc[iqa]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if weights_dir is not None:
        verify_weights(weights_dir)
        torch.hub.set_dir(str(weights_dir / "hub"))
        os.environ["TORCH_HOME"] = str(weights_dir)
        os.environ["HF_HOME"] = str(weights_dir / "huggingface")
    declare_torchvision_operators()
    import pyiqa
    from pyiqa.utils import download_util

    if weights_dir is not None:
        download_util.DEFAULT_CACHE_DIR = str(weights_dir / "hub" / "pyiqa")
    return pyiqa


def verify_weights(folder: Path) -> None:
    """Check every file of `folder`/SHA256SUMS. Raises ValueError naming what is missing or differs."""
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        raise ValueError(f"{listing} not found; stage the weights with tools/stage_weights.py recipe=NAME collect=DIR")
    for line in listing.read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        path = folder / name.lstrip("*")
        if not path.is_file():
            raise ValueError(f"{path} is listed in SHA256SUMS but missing; copy it there")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{path} has SHA-256 {found}, not {expected}; fetch it again or correct SHA256SUMS")


def declare_torchvision_operators() -> None:
    """Let a torchvision built for CUDA import beside a CPU build of torch.

    torchvision registers fakes for two operators whose schemas its own library would declare; on the CPU that
    library cannot be loaded. Nothing we use calls them.
    """
    if _LIBRARIES or torch.version.cuda is not None:
        return
    try:
        library = torch.library.Library("torchvision", "DEF")
    except RuntimeError:  # another part of the program declared them
        return
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


def _create(pyiqa: Any, name: str, device: str) -> Any:
    try:
        with no_downloads(name):
            return pyiqa.create_metric(name, device=torch.device(device))
    except FileNotFoundError as error:  # huggingface_hub, offline: timm's backbone of a metric
        raise ValueError(
            f"pyiqa metric {name!r} needs a backbone from the Hugging Face hub that is not staged ({error}); put the "
            f"hub's cache into {os.environ.get('HF_HOME', 'weights_dir/huggingface')} and list it in SHA256SUMS"
        ) from error


@contextmanager
def no_downloads(name: str) -> Iterator[None]:
    """Turn every download that pyiqa or torch would try into an error that names the missing file."""
    from pyiqa.utils import download_util

    def refuse(url: str, dst: str, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"pyiqa metric {name!r} needs the weights {dst}, which are not there; copy them from {url} "
            "and list them in SHA256SUMS of the weights folder (options.weights_dir)"
        )

    held = torch.hub.download_url_to_file, download_util.download_url_to_file
    torch.hub.download_url_to_file = download_util.download_url_to_file = refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file, download_util.download_url_to_file = held


def _number(text: str) -> float | None:
    match = re.fullmatch(r"\s*~?\s*(-?[\d.]+)\s*", text)
    return float(match.group(1)) if match else None
