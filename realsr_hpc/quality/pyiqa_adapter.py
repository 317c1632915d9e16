"""The only module that uses pyiqa (extra `iqa`, licence PolyForm-Noncommercial: read it before commercial use).

Metrics are addressed by pyiqa's names; direction and range come from its table, and scores are mapped to [0, 1], higher
is better. pyiqa downloads weights and unpickles them unchecked. Here nothing is downloaded and nothing outside of one
folder is read; its SHA256SUMS, which must list every file that could be unpickled, is verified first:

    weights_dir/SHA256SUMS                      in the format of sha256sum, paths relative to weights_dir
    weights_dir/hub/pyiqa/*.pth | *.mat         pyiqa's heads
    weights_dir/hub/checkpoints/*.pth           torchvision backbones
    weights_dir/hub/clip/*.pt                   CLIP
    weights_dir/huggingface/...                 timm backbones (HF_HOME)
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal  # Any: pyiqa's metrics

import numpy as np
import torch

from realsr_hpc.config.weights import PYIQA_FILES, WEIGHTS_DIR, read_sums
from realsr_hpc.files import SUMS_FILE, sha256_of
from realsr_hpc.paths import resolve
from realsr_hpc.quality.batching import same_shapes

_STAGING = "realsr-hpc stage-weights recipe=NAME collect=DIR"
_WEIGHT_SUFFIXES = {".pth", ".pt", ".mat", ".bin", ".npz", ".ckpt", ".safetensors"}
_LIBRARIES: list[torch.library.Library] = []
"""Keeps the libraries alive whose operator declarations would vanish with them."""


class PyiqaMetrics:
    """Mean of pyiqa metrics, each mapped to [0, 1], higher is better: no-reference (`NR`) or full-reference (`FR`)."""

    def __init__(
        self,
        names: Sequence[str],
        weights_dir: str | None = None,
        device: torch.device | str = "cpu",
        mode: Literal["NR", "FR"] = "NR",
    ):
        load_pyiqa(weights_dir)
        self.device = torch.device(device)
        self.metrics = [(*normalisation(name, mode), create_metric(name, device)) for name in names]

    def to(self, device: torch.device) -> None:
        """Move the metrics to a device."""
        self.device = device
        for *_, metric in self.metrics:
            metric.to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Scores [n] of RGB uint8 images [H, W, 3]; `FR` needs references of the same shapes."""
        scores = np.zeros(len(images))
        for places, stack in same_shapes(images):
            inputs = [_pixels(stack)]
            if references is not None:
                inputs.append(_pixels(np.stack([references[place] for place in places])))
            inputs = [pixels.to(self.device) for pixels in inputs]
            for low, high, lower_better, metric in self.metrics:
                raw = metric(*inputs).double().reshape(-1).cpu().numpy()
                unit = np.clip((raw - low) / (high - low), 0.0, 1.0)
                scores[places] += (1.0 - unit if lower_better else unit) / len(self.metrics)
        return scores


OPEN_RANGES = {"niqe": (0.0, 20.0), "ilniqe": (0.0, 100.0), "brisque": (0.0, 100.0), "piqe": (0.0, 100.0)}
"""Ranges, in the metric's unit, for metrics whose range is open in pyiqa's table."""
GPU_ONLY = frozenset({"maclip"})
"""Metrics that pyiqa 0.1.15 always moves to CUDA."""


def _pixels(stack: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(stack)).permute(0, 3, 1, 2).float() / 255.0


def normalisation(name: str, mode: Literal["NR", "FR"] = "NR") -> tuple[float, float, bool]:
    """Lowest and highest score, and whether lower is better, from pyiqa's table. Call `load_pyiqa` first.

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


def load_pyiqa(weights_dir: str | None) -> None:
    """Import pyiqa in offline mode, after verifying the staged weights.

    weights_dir: None means weights/iqa, which may be missing. Raises ValueError if the extra is not installed, or a
    staged file is missing, differs or is not listed.
    """
    if importlib.util.find_spec("pyiqa") is None:
        raise ValueError("expert=pyiqa needs the extra `iqa`: pip install 'realsr-hpc[iqa]'")
    folder = resolve(weights_dir or WEIGHTS_DIR)
    if weights_dir or folder.is_dir():
        verify_weights(folder)
    # Also without a weights folder, because files in the user's caches are unverified.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(folder), "HF_HOME": str(folder / "huggingface")}
    from huggingface_hub import constants

    # huggingface_hub reads the environment only when it is imported, which may have happened before.
    constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, str(folder / "huggingface" / "hub")
    torch.hub.set_dir(str(folder / "hub"))
    declare_torchvision_operators()
    from pyiqa.utils import download_util

    download_util.DEFAULT_CACHE_DIR = str(folder / "hub" / "pyiqa")


def verify_weights(folder: Path) -> None:
    """Verify every weights file that is in `folder` or listed in its SHA256SUMS. ValueError names the first fault."""
    if not (folder / SUMS_FILE).is_file():
        raise ValueError(f"{folder / SUMS_FILE} not found; stage the weights with {_STAGING}")
    sums = read_sums(folder)
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is listed in {SUMS_FILE} but missing; copy it there")
        found = sha256_of(path)
        if found != expected:
            raise ValueError(f"{path} has SHA-256 {found}, not {expected}; fetch it again or correct {SUMS_FILE}")
    for path in sorted(folder.rglob("*")):
        if path.suffix in _WEIGHT_SUFFIXES and path.relative_to(folder).as_posix() not in sums:
            raise ValueError(f"{path} is not listed in {SUMS_FILE}; list it with {_STAGING}, or remove it")


def declare_torchvision_operators() -> None:
    """Make a torchvision built for CUDA importable beside a CPU build of torch.

    torchvision registers fake implementations of two operators that its compiled library declares; that library cannot
    be loaded without CUDA. The metrics do not call these operators.
    """
    if _LIBRARIES or torch.version.cuda is not None:
        return
    try:
        library = torch.library.Library("torchvision", "DEF")
    except RuntimeError:  # already declared elsewhere
        return
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


def create_metric(name: str, device: torch.device | str) -> Any:
    """Create a pyiqa metric and read its weights, without downloads. Call `load_pyiqa` first.

    Raises ValueError naming the missing file or GPU.
    """
    import pyiqa

    if name in GPU_ONLY and not torch.cuda.is_available():
        raise ValueError(f"pyiqa computes {name!r} only on a GPU, and there is none; choose another metric")
    try:
        with no_downloads(name), _inside_the_folder():
            return pyiqa.create_metric(name, device=torch.device(device))
    except (OSError, RuntimeError, ImportError) as error:  # a missing backbone, unsuitable weights, a missing package
        files = " and ".join(path for path, _ in PYIQA_FILES.get(name, ())) or "what it says"
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"pyiqa metric {name!r} needs {files} in the weights folder ({reason}); {_STAGING}") from error


@contextmanager
def no_downloads(name: str) -> Iterator[None]:
    """Turn downloads by pyiqa, torch and CLIP into a ValueError that names the missing file."""
    from pyiqa.utils import download_util

    def refuse(url: object, dst: str = "", *_: object, **__: object) -> None:
        raise ValueError(
            f"pyiqa metric {name!r} needs the weights {dst or url}, which are not there; copy them from {url} "
            "and list them in SHA256SUMS of the weights folder (options.weights_dir)"
        )

    held = torch.hub.download_url_to_file, download_util.download_url_to_file, urllib.request.urlopen
    torch.hub.download_url_to_file = download_util.download_url_to_file = urllib.request.urlopen = refuse
    try:
        yield
    finally:
        torch.hub.download_url_to_file, download_util.download_url_to_file, urllib.request.urlopen = held


@contextmanager
def _inside_the_folder() -> Iterator[None]:
    """Keep metrics from reading outside of the staged folder and from writing into it.

    A-FINE looks for CLIP in the user's cache. LIQE stores features of its prompts beside the staged files and unpickles
    them from there.
    """
    from pyiqa.archs import afine_arch, liqe_arch

    held = afine_arch.load, liqe_arch.DEFAULT_CACHE_DIR
    with tempfile.TemporaryDirectory() as scratch:
        afine_arch.load = partial(held[0], download_root=str(Path(torch.hub.get_dir()) / "clip"))
        liqe_arch.DEFAULT_CACHE_DIR = scratch
        try:
            yield
        finally:
            afine_arch.load, liqe_arch.DEFAULT_CACHE_DIR = held


def _number(text: str) -> float | None:
    match = re.fullmatch(r"\s*~?\s*(-?[\d.]+)\s*", text)
    return float(match.group(1)) if match else None
