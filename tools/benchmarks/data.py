"""Degraded images per second, on one core: ours in DALI, OpenCV and NumPy, PyTorch after BasicSR, a DataLoader.

    python tools/bench.py data [side=512] [images=16] [rounds=5] [loader=32] [gpu=0]

Two tables. The first: degradation alone of the same crops (already at the truth's side) with the same parameters and
noise, sharpening off. The second: from files to batches, decoding and cropping included: ours against a PyTorch
DataLoader with one worker around the OpenCV degradation, the same samples; CPU time of worker processes counted. Ways
take turns; the figures are medians of CPU time, so that a busy machine blurs them less. gpu=1 adds ours on the GPU
(wall time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import cv2
import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from realsr_hpc.config.arguments import read_arguments, read_counts, read_flag
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.dali_pipeline import DegradationPipeline
from realsr_hpc.data.degradation import PRESETS, Stream, generator
from realsr_hpc.data.graph_inputs import DegradationInput
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.data.samples import Geometry, Samples
from realsr_hpc.paths import resolve
from tools.benchmarks._degradation_inputs import UPSCALE, realesrgan_inputs
from tools.benchmarks._degraders import degrade_opencv, degrade_torch
from tools.benchmarks._measure import alternately, show

BATCH = 16
IDLE_S = 1.5
"""Without work for so long, nothing is being made."""


def main(arguments: list[str]) -> int:
    """Exit code 2 for an unknown option."""
    counts = {"side": "512", "images": "16", "rounds": "5", "loader": "32"}
    given = read_arguments(arguments, {**counts, "gpu": "0"}, __doc__)
    options, gpu = read_counts(given, counts), read_flag(given, "gpu")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    degradation_alone(options["side"], options["images"], options["rounds"], gpu)
    files_to_batches(options["side"], options["loader"], options["rounds"])
    return 0


def degradation_alone(side: int, count: int, rounds: int, gpu: bool) -> None:
    """First table."""
    samples = realesrgan_inputs(side, count)
    ours = DegradationPipeline(count, side, UPSCALE, usm_sharpen_gt=False)
    ways: dict[str, Callable[[], Iterable[np.ndarray]]] = {
        "ours (DALI)": lambda: ours.run(samples())[0],
        "OpenCV, NumPy": lambda: [degrade_opencv(sample, side // UPSCALE) for sample in samples()],
        "PyTorch (BasicSR)": lambda: [degrade_torch(sample, side // UPSCALE) for sample in samples()],
    }
    results = {name: np.stack(list(way())) for name, way in ways.items()}  # warms up, too
    timings = alternately(ways, rounds)
    base = timings["ours (DALI)"].median_cpu_s
    rows = []
    for name, timing in timings.items():
        each = timing.median_cpu_s / count
        away = np.abs(results[name].astype(int) - results["ours (DALI)"]).mean()
        rows.append([name, f"{1000 * each:.1f}", f"{1 / each:.1f}", f"{timing.median_cpu_s / base:.2f}", f"{away:.2f}"])
    if gpu:
        rows.append(_on_gpu(samples, side, count, rounds, base))
    columns = ("degradation", "CPU ms per image", "images/s per core", "time / ours", "mean difference of 255")
    show(f"Degradation alone, {count} crops of {side} px", columns, rows)


def _on_gpu(samples: Callable, side: int, count: int, rounds: int, base: float) -> list[str]:
    graph = DegradationPipeline(count, side, UPSCALE, usm_sharpen_gt=False, device_id=0)
    graph.run(samples())
    started = time.perf_counter()
    for _ in range(rounds):
        graph.run(samples())
    each = (time.perf_counter() - started) / rounds / count
    return ["ours, GPU (wall)", f"{1000 * each:.2f}", f"{1 / each:.1f}", f"{each * count / base:.3f}", ""]


class DegradedPhotographs(Dataset):
    """The usual way: a map-style data set that decodes, crops and degrades one image a call."""

    def __init__(self, samples: Samples, count: int) -> None:
        self.samples, self.count = samples, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Degraded image and truth, uint8 [3, H, W]."""
        cv2.setNumThreads(1)
        sample, geometry = self.samples[index], self.samples.geometry
        assert sample.gt is not None and sample.parameters is not None, "unpaired samples have both"
        gt = cv2.resize(sample.gt, (geometry.gt_size_px,) * 2, interpolation=cv2.INTER_AREA)
        noise = generator(self.samples.seed, index, Stream.NOISE)
        lq = degrade_opencv(DegradationInput(gt, sample.parameters, noise), geometry.lq_size_px)
        return torch.from_numpy(lq).permute(2, 0, 1), torch.from_numpy(gt).permute(2, 0, 1)


def files_to_batches(side: int, count: int, rounds: int) -> None:
    """Second table: each way delivers `count` images in batches a round."""
    config = compose_one(["recipe=sft_tiny", f"vlcot.image_sizes_px=[32,64,{side}]", "degradation.usm_sharpen_gt=false",
                          "data.manifest=recipes/assets/photographs/manifest.parquet",
                          "model.max_sequence_tokens=100000", "parallel.microbatch_tokens=100000"])  # fmt: skip
    batches = max(1, count // BATCH)
    loader = LQLoader(config, "train", BATCH)
    usual = iter(_usual_loader(config, batches * (rounds + 1) * BATCH))
    ways = {
        "ours (LQLoader)": lambda: [loader.next() for _ in range(batches)],
        "DataLoader, 1 worker": lambda: [next(usual) for _ in range(batches)],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            used = _cpu_s_when_idle()
            way()
            if number:  # the first round starts threads and workers
                times[name].append(_cpu_s_when_idle() - used)
    loader.close()
    each = {name: float(np.median(values)) / (batches * BATCH) for name, values in times.items()}
    rows = [
        [name, f"{1000 * value:.1f}", f"{1 / value:.1f}", f"{value / each['ours (LQLoader)']:.2f}"]
        for name, value in each.items()
    ]
    columns = ("way", "CPU ms per image", "images/s per core", "time / ours")
    show(f"Files to batches of {BATCH}, {side} px", columns, rows)


def _usual_loader(config: RunConfig, count: int) -> DataLoader:
    geometry = Geometry(max(config.vlcot.image_sizes_px), UPSCALE, config.data.min_scene_fraction, config.data.hflip)
    manifest = read_manifest(resolve(config.data.manifest)).split("train")
    samples = Samples(
        manifest, "unpaired", geometry, PRESETS[config.degradation.preset], seed=config.seed, shuffle=True
    )
    return DataLoader(DegradedPhotographs(samples, count), BATCH, num_workers=1, persistent_workers=True)


def _cpu_s_when_idle() -> float:
    """CPU seconds of this process and of those it started, once no batch is being made ahead any more.

    Both ways keep a few batches ready. Waiting for these before and after a round counts as many as were taken, and
    keeps one way's work out of the other's round.
    """
    me, before = psutil.Process(), -1.0
    while True:
        used = sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))
        if used - before < 0.05:
            return used
        before = used
        time.sleep(IDLE_S)
