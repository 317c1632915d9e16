"""Parts of `bench.py gpu` that compute with pixels: degradation by DALI, decoding to pixels, rewards."""

from __future__ import annotations

import numpy as np
import torch

from realsr_hpc.config.load import compose_one
from realsr_hpc.data.dali_operators import DALIOperators
from realsr_hpc.data.dali_pipeline import DegradationPipeline
from realsr_hpc.parallel import backend
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from tools.benchmarks._degradation_inputs import UPSCALE, realesrgan_inputs
from tools.benchmarks._gpu_models import Figure, Size, seconds_of
from tools.benchmarks.rewards import some_candidates


def degradation(size: Size, side: int, count: int) -> list[Figure]:
    """The same crops and parameters by the host's operators and by the GPU's; without a GPU by DALI's on the CPU."""
    samples = realesrgan_inputs(side, count)
    host = DegradationPipeline(count, side, UPSCALE, usm_sharpen_gt=False)
    where = {"device_id": 0} if backend.on_cuda() else {"operators": DALIOperators("cpu")}
    other = DegradationPipeline(count, side, UPSCALE, usm_sharpen_gt=False, **where)  # type: ignore[arg-type]
    images = [np.stack([np.asarray(image) for image in graph.run(samples())[0]]).astype(int) for graph in (host, other)]
    times = [seconds_of(lambda graph=graph: graph.run(samples()), size.repeats) for graph in (host, other)]
    away = float(np.abs(images[0] - images[1]).mean())
    return [
        Figure("mean difference from the CPU's pixels", away, "of 255", most=1.0),
        Figure("images by the CPU, one thread", count / times[0], "/s"),
        Figure("images by the GPU", count / times[1], "/s"),
        Figure("GPU faster by", times[0] / times[1], "x", least=1.0 if backend.on_cuda() else None),
    ]


def rewards(size: Size, overrides: list[str], count: int) -> list[Figure]:
    """Rollouts a second: code grids to pixels on the device, and each reward of the recipe over a whole batch."""
    config = compose_one(["recipe=grpo_tiny", *overrides])
    image = load_image_tokenizer(config.image_tokenizer, backend.device()).eval()
    side = config.vlcot.image_sizes_px[2] // config.image_tokenizer.downsample
    codes = torch.zeros(count, side, side, dtype=torch.long, device=backend.device())
    with torch.no_grad():
        decoding = seconds_of(lambda: image.decode(codes), size.repeats)
    candidates = some_candidates(count, config.vlcot.image_sizes_px[2])
    mixture = RewardMixture(config.rewards)
    figures = [Figure("rollouts decoded to pixels", count / decoding, "/s")]
    for name, reward in mixture.rewards.items():
        each = seconds_of(lambda reward=reward: reward.score(candidates), size.repeats)
        figures.append(Figure(f"rollouts scored by {name}", count / each, "/s"))
    whole = seconds_of(lambda: mixture.score(candidates), size.repeats)
    return [*figures, Figure("rollouts scored by all", count / whole, "/s")]
