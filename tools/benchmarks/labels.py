"""What can be told of a degradation by looking: a small probe for every slot, by both kinds of labels.

    python tools/bench.py labels [lq_px=32] [images=1500] [heldout=500] [section.field=value ...]

The probe reads LQ images of the training photographs alone (statistics of their gradients, spectra and 8 x 8 blocks in
Y, Cb, Cr, into a network of one hidden layer) and names slots of held-out photographs. Printed: how often the most
frequent word is right, how often the probe is, how often it is at most one level away, and how often the same probe is
that reads the image tokenizer's codes of the LQ images, as embedded: about what a policy could know that sees no more.
degradation.preset=seesr asks the other preset.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from rich.progress import track
from scipy.fft import dctn
from torch import nn

from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.config.schema import DegradationConfig, RunConfig
from realsr_hpc.data.dali_pipeline import DegradationPipeline
from realsr_hpc.data.degradation import PRESETS, Stream, generator
from realsr_hpc.data.graph_inputs import DegradationInput
from realsr_hpc.data.labels import Labeller
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.data.operators import operators_of
from realsr_hpc.data.samples import Geometry, Sample, Samples
from realsr_hpc.evaluate.words import SLOTS
from realsr_hpc.paths import resolve
from realsr_hpc.tokenizer.trace import TraceTokenizer
from tools.benchmarks._measure import show

BATCH, UPSCALE = 16, 4
WORDS = {word: number for words in (("light", "medium", "heavy"), ("upsample", "keep", "downsample"))
         for number, word in enumerate(words)}  # fmt: skip
KINDS = ("applied", "visible")
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], np.float32)
STEPS, NETWORKS, HIDDEN = 700, 3, 96


def main(arguments: list[str]) -> int:
    """Exit code 2 for a wrong recipe."""
    given, overrides = read_with_overrides(arguments, {"lq_px": "32", "images": "1500", "heldout": "500"}, __doc__)
    options = read_counts(given, given)
    torch.set_num_threads(1)
    side = UPSCALE * options["lq_px"]
    sizes = [f"vlcot.image_sizes_px=[{side // 4},{side // 2},{side}]", "data=bundled",
             "model.max_sequence_tokens=100000", "parallel.microbatch_tokens=100000"]  # fmt: skip
    try:
        config = compose_one(["recipe=sft_tiny", *sizes, *overrides])
    except RecipeError as error:
        print(error)
        return 2
    tokenizer = TraceTokenizer.load(config, torch.device("cpu"))
    taught = looked_at(config, tokenizer, config.data.train_split, options["images"])
    asked = looked_at(config, tokenizer, config.data.heldout_split, options["heldout"])
    rows = [row for kind in KINDS for row in rows_of(kind, taught, asked)]
    columns = ("labels", "slot", "majority", "probe", "one away", "probe of codes")
    show(f"{config.degradation.preset}, LQ {options['lq_px']} px: share of slots named rightly", columns, rows)
    return 0


class Looked:
    """Features of images and codes, and words [n, 5] as numbers by kind of labels."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []
        self.words: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}


def looked_at(config: RunConfig, tokenizer: TraceTokenizer, split: str, count: int) -> Looked:
    """Of the first `count` samples of a split."""
    side, preset = max(config.vlcot.image_sizes_px), config.degradation.preset
    geometry = Geometry(side, UPSCALE, config.data.min_scene_fraction, config.data.hflip)
    manifest = read_manifest(resolve(config.data.manifest)).split(split)
    samples = Samples(manifest, "unpaired", geometry, PRESETS[preset], seed=config.seed, shuffle=True)
    pipeline = DegradationPipeline(BATCH, side, UPSCALE, usm_sharpen_gt=config.degradation.usm_sharpen_gt)
    labellers = {kind: Labeller(DegradationConfig(preset=preset, labels=kind), side, UPSCALE) for kind in KINDS}
    shown_px, looked = max(config.vlcot.lq_size_px, side // UPSCALE), Looked()
    for start in track(range(0, count, BATCH), f"{split} images"):
        batch = [samples[index] for index in range(start, start + BATCH)]
        lq, _ = pipeline.run([_input(sample, config.seed) for sample in batch])
        looked.images.append(image_features(lq))
        grids = tokenizer.encode(torch.from_numpy(lq).permute(0, 3, 1, 2), shown_px)
        looked.codes.append(code_features(tokenizer.image.quantize.codebook().detach().numpy()[grids]))
        for sample in batch:
            for kind, label in labellers.items():
                assert sample.parameters is not None and sample.gt is not None, "unpaired samples have both"
                operators = operators_of(sample.parameters, side // UPSCALE)
                words = label(sample.parameters, operators, sample.gt)
                looked.words[kind].append([WORDS[word] for word in astuple(words)])
    return looked


def _input(sample: Sample, seed: int) -> DegradationInput:
    assert sample.parameters is not None and sample.gt is not None, "unpaired samples have both"
    return DegradationInput(sample.gt, sample.parameters, generator(seed, sample.index, Stream.NOISE))


def image_features(images: UInt8[np.ndarray, "B h h 3"]) -> Float32[np.ndarray, "B F"]:
    """Quantiles of first and second differences, block phases, radial spectra, sizes and zeros of DCT coefficients."""
    planes = np.moveaxis(images.astype(np.float32) @ YCBCR.T, 3, 1)
    count, side = len(planes), planes.shape[2] // 8 * 8
    found = [_radial_spectrum(planes)]
    for axis in (2, 3):
        for order in (1, 2):
            steps = np.abs(np.diff(planes, order, axis=axis))
            quantiles = np.quantile(steps.reshape(count, 3, -1), [0.1, 0.25, 0.5, 0.75, 0.9, 0.97], axis=2)
            found.append(np.log(np.moveaxis(quantiles, 0, 2) + 0.1))
        line = np.abs(np.diff(planes, axis=axis)).mean(5 - axis)
        phases = np.stack([line[..., phase::8].mean(-1) for phase in range(8)], -1)
        found.append(phases / (phases.mean(-1, keepdims=True) + 1e-3))
    blocks = planes[..., :side, :side].reshape(count, 3, side // 8, 8, side // 8, 8)
    sizes = np.abs(dctn(blocks, axes=(3, 5), norm="ortho"))  # pyright: ignore[reportArgumentType, reportCallIssue]
    found += [np.log(np.median(sizes, (2, 4)) + 0.1), (sizes < 0.6).mean((2, 4))]
    return np.concatenate([part.reshape(count, -1) for part in found], 1).astype(np.float32)


def _radial_spectrum(planes: np.ndarray) -> np.ndarray:
    side = planes.shape[2]
    window = np.outer(np.hanning(side), np.hanning(side))
    power = np.abs(np.fft.fft2((planes - planes.mean((2, 3), keepdims=True)) * window)) ** 2
    frequency = np.fft.fftfreq(side)
    ring = np.minimum(np.hypot(frequency[:, None], frequency) * 32, 20).astype(int).ravel()
    member = (ring[:, None] == np.arange(21)) / np.bincount(ring, minlength=21)
    return np.log(power.reshape(*planes.shape[:2], -1) @ member + 0.01)


def code_features(embedded: Float32[np.ndarray, "B h w E"]) -> Float32[np.ndarray, "B F"]:
    """Mean and deviation of each dimension, mean steps to the neighbours."""
    steps = [np.abs(np.diff(embedded, axis=axis)).mean((1, 2)) for axis in (1, 2)]
    return np.concatenate([embedded.mean((1, 2)), embedded.std((1, 2)), *steps], 1).astype(np.float32)


def rows_of(kind: str, taught: Looked, asked: Looked) -> list[list[str]]:
    """One row a slot."""
    words, truth = np.array(taught.words[kind]), np.array(asked.words[kind])
    said = probe(np.concatenate(taught.images), words, np.concatenate(asked.images))
    by_codes = probe(np.concatenate(taught.codes), words, np.concatenate(asked.codes))
    rows = []
    for slot, name in enumerate(SLOTS):
        frequent = np.bincount(words[:, slot], minlength=3).argmax()
        right = [(guess == truth[:, slot]).mean() for guess in (frequent, said[:, slot], by_codes[:, slot])]
        near = f"{(np.abs(said[:, slot] - truth[:, slot]) <= 1).mean():.2f}" if "resize" not in name else "-"
        rows.append([kind, name, f"{right[0]:.2f}", f"{right[1]:.2f}", near, f"{right[2]:.2f}"])
    return rows


def probe(features: np.ndarray, words: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Words [n, 5] for `asked`: the mean of a few networks that learnt them from `features`."""
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x, y = torch.from_numpy((features - mean) / spread), torch.from_numpy(words)
    z = torch.from_numpy((asked - mean) / spread).clamp(-5, 5)
    total = torch.zeros(len(asked), words.shape[1], 3)
    for seed in range(NETWORKS):
        torch.manual_seed(seed)
        total += _network(x.clamp(-5, 5), y)(z).view(total.shape).softmax(-1).detach()
    return total.argmax(-1).numpy()


def _network(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """One hidden layer, taught with dropout and weight decay."""
    network = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(x.shape[1], HIDDEN), nn.GELU(), nn.Dropout(0.5), nn.Linear(HIDDEN, 3 * y.shape[1])
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(network(x[rows]).view(-1, 3), y[rows].view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()
