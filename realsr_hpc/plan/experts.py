"""Resources of the networks that compute rewards: weights, working memory, floating-point operations, host time.

Measured on the CPU for pyiqa's networks with random weights (0.1.15.post2; images of 128 to 512 px) and for those of
this project: bytes of weights, peak allocation while one image is scored, and operations (a multiply-add counts as
two). Memory and operations are linear in the number of pixels, except for networks that cut a fixed number of crops of
a fixed size. `tools/bench.py memory` and tests/unit/plan/test_experts.py repeat the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from realsr_hpc.config.reward_options import (
    FidelityOptions,
    GenerationOptions,
    HttpOptions,
    UnderstandingOptions,
    read_options,
)
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.sizes import dp_size, sequences_per_update


@dataclass(frozen=True)
class Expert:
    """The cost of one network or metric that scores an image."""

    weight_bytes: float = 0.0
    px_bytes: float = 0.0
    """Working memory per pixel."""
    image_bytes: float = 0.0
    """Working memory per image, independent of its size."""
    px_flops: float = 0.0
    image_flops: float = 0.0
    host_px_s: float = 0.0
    """Seconds of one CPU core per pixel, for work that never runs on a GPU."""

    def bytes_at_work(self, pixels: int) -> float:
        """Working memory in bytes for an image of this many pixels, without the weights."""
        return self.px_bytes * pixels + self.image_bytes

    def flops(self, pixels: int) -> float:
        """Floating-point operations for one image."""
        return self.px_flops * pixels + self.image_flops


RANKER = Expert(weight_bytes=420e3, px_bytes=107.0, px_flops=3402.0)
NIQE = Expert(px_bytes=69.0, px_flops=9.0)
STRIPE_GUARD = Expert(host_px_s=0.25e-6)
PSNR = Expert(px_bytes=26.0, px_flops=12.0, host_px_s=0.05e-6)
SSIM = Expert(px_bytes=163.0, px_flops=207.0, host_px_s=0.4e-6)
MINILM = Expert(weight_bytes=91e6)
PYIQA = {
    "topiq_nr": Expert(181.0e6, px_bytes=530.0, image_bytes=4.1e6, px_flops=282e3),
    "musiq": Expert(108.5e6, px_bytes=252.0, image_bytes=49.9e6, px_flops=80e3, image_flops=14.0e9),
    "maniqa": Expert(543.2e6, image_bytes=20 * 114.0e6, image_flops=20 * 280.1e9),  # 20 crops of any image
    "clipiqa": Expert(408.0e6, px_bytes=224.0, px_flops=243e3, image_flops=11.7e9),
    "topiq_fr": Expert(144.4e6, px_bytes=838.0, image_bytes=2.5e6, px_flops=378e3),
}
"""By pyiqa's names without the part after a hyphen."""


@dataclass(frozen=True)
class Rewards:
    """The experts of a recipe by reward term."""

    terms: dict[str, tuple[Expert, ...]]
    unknown: tuple[str, ...]
    """pyiqa's metrics whose cost was not measured; they count as zero."""
    elsewhere: tuple[str, ...]
    """Terms that another process computes over HTTP."""

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights of all terms."""
        return sum(sum(one.weight_bytes for one in experts) for experts in self.terms.values())

    @property
    def largest_weight_bytes(self) -> float:
        """Bytes of the weights of the largest term; offloaded terms are moved to the device one at a time."""
        return max((sum(one.weight_bytes for one in experts) for experts in self.terms.values()), default=0.0)

    def bytes_at_work(self, pixels: int) -> float:
        """Largest working memory of an expert in bytes; experts run one after another."""
        return max((one.bytes_at_work(pixels) for one in self._all()), default=0.0)

    def flops(self, pixels: int) -> float:
        """Floating-point operations of all experts for one image."""
        return sum(one.flops(pixels) for one in self._all())

    def host_s(self, pixels: int) -> float:
        """Seconds on one CPU core for one image."""
        return sum(one.host_px_s for one in self._all()) * pixels

    def _all(self) -> Iterator[Expert]:
        for experts in self.terms.values():
            yield from experts


def rewards_of(config: RunConfig) -> Rewards:
    """The experts of a GRPO recipe; none for other tasks."""
    if config.task != "grpo":
        return Rewards({}, (), ())
    terms: dict[str, tuple[Expert, ...]] = {}
    unknown: list[str] = []
    elsewhere: list[str] = []
    for name, term in config.rewards.terms.items():
        match read_options(name, term):
            case GenerationOptions() as options:
                guard = (STRIPE_GUARD,) if options.stripe_guard else ()
                own = {"ranker": RANKER, "niqe": NIQE}
                experts = [own[options.expert]] if options.expert != "pyiqa" else _pyiqa(options.metrics, unknown)
                terms[name] = (*experts, *guard)
            case FidelityOptions(metric="pyiqa") as options:
                terms[name] = tuple(_pyiqa(options.metrics, unknown))
            case FidelityOptions() as options:
                terms[name] = (SSIM if options.metric == "ssim" else PSNR,)
            case UnderstandingOptions() as options:
                terms[name] = (MINILM,) if "minilm" in (options.similarity, options.synonyms) else ()
            case HttpOptions():
                elsewhere.append(name)
            case _:
                terms[name] = ()
    return Rewards(terms, tuple(unknown), tuple(elsewhere))


def _pyiqa(metrics: list[str], unknown: list[str]) -> list[Expert]:
    known = {metric: PYIQA.get(metric.partition("-")[0]) for metric in metrics}
    unknown += [metric for metric, expert in known.items() if expert is None]
    return [expert for expert in known.values() if expert is not None]


def final_pixels(config: RunConfig) -> int:
    """Pixels of a final image."""
    return config.vlcot.image_sizes_px[-1] ** 2


def on_the_device(config: RunConfig) -> bool:
    """Whether the networks run on the same device as the policy."""
    return config.rewards.device != "cpu" or config.cluster.gpus_per_node == 0


def rollouts_of_a_rank(config: RunConfig) -> int:
    """Number of rollouts of a step that the busiest rank decodes and scores; the ranks of a replica share the
    batches."""
    rollouts, size = math.ceil(sequences_per_update(config) / dp_size(config)), config.rewards.batch_size
    return size * math.ceil(math.ceil(rollouts / size) / (config.parallel.tp * config.parallel.pp))
