"""Fits and measures the no-reference experts on the bundled photographs: `realsr-hpc fit-experts`.

The ranker is trained on ladders, versions of one crop with increasing severity of degradation: of two versions the less
severe one must score higher, by a margin proportional to the difference in severity (RankIQA, Liu et al. 2017). A weak
regression to 2 - 4 x severity fixes the scale of the score. The measurement on held-out photographs is the share of
pairs of versions in the right order, for each operator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from realsr_hpc.quality.ladder import OPERATORS, ladder, random_crop
from realsr_hpc.quality.niqe import NIQEModel, fit_pristine, luminance
from realsr_hpc.quality.ranker import Ranker

logger = logging.getLogger(__name__)
SIZE_PX = 128
SEVERITIES = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)


def fit_niqe(pictures: Sequence[Image.Image], patch_px: int = 32, stride_px: int = 32) -> NIQEModel:
    """The pristine model of sharp patches from photographs, reduced to several sizes from `SIZE_PX` up.

    patch_px, stride_px: side of a patch and distance between patches.
    """
    lumas = []
    for picture in pictures:
        short = min(picture.size)
        for side in sorted({SIZE_PX, *(int(short / factor) for factor in (1.5, 2.0))}):
            if side >= SIZE_PX:
                scale = side / short
                size = (round(picture.width * scale), round(picture.height * scale))
                lumas.append(luminance(np.asarray(picture.resize(size, Image.Resampling.BICUBIC))[None])[0])
    return fit_pristine(lumas, patch_px, stride_px)


def train_ranker(
    pictures: Sequence[Image.Image], num_steps: int = 800, batch_size: int = 8, lr: float = 2e-3, seed: int = 0
) -> Ranker:
    """Train a ranker on random ladders of random crops; lr: peak learning rate of a one-cycle schedule."""
    torch.manual_seed(seed)
    ranker = Ranker()
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=num_steps)
    for step, (images, severities) in enumerate(_batches(pictures, batch_size, num_steps, seed)):
        loss = ranking_loss(ranker(images.flatten(0, 1)).view(severities.shape), severities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            logger.info("step %d of %d: loss %.4f", step, num_steps, loss.item())
    return ranker.eval()


def ranking_loss(scores: torch.Tensor, severities: torch.Tensor) -> torch.Tensor:
    """Margin ranking loss of scores [n, rungs] for severities [n, rungs] in 0..1, plus the regression that fixes the
    scale."""
    gap = severities[:, None, :] - severities[:, :, None]
    lead = scores[:, :, None] - scores[:, None, :]
    ordered = gap > 0
    ranking = torch.relu(2.0 * gap - lead)[ordered].mean()
    return ranking + 0.1 * torch.nn.functional.smooth_l1_loss(scores, 2.0 - 4.0 * severities)


def measure(
    expert: Callable[[Sequence[np.ndarray]], np.ndarray], pictures: Sequence[Image.Image], crops: int = 3
) -> dict[str, float]:
    """Share (0..1) of pairs of rungs in the right order (higher score for lower severity), by operator and mixture."""
    mixtures = {"blur+noise+jpeg": ["blur", "noise", "jpeg"], "resize+noise+jpeg": ["resize", "noise", "jpeg"]}
    chains = {name: [name] for name in OPERATORS} | mixtures
    return {name: _share_in_order(expert, pictures, names, crops) for name, names in chains.items()}


def share_in_order(scores: np.ndarray) -> float:
    """Share of pairs that decrease among scores [rungs], ordered from clean to degraded; ties count half."""
    pairs = [(scores[i], scores[j]) for i in range(len(scores)) for j in range(i + 1, len(scores))]
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))


def _share_in_order(expert, pictures: Sequence[Image.Image], names: Sequence[str], crops: int) -> float:
    shares = []
    for seed, picture in enumerate(picture for picture in pictures for _ in range(crops)):
        crop = random_crop(picture, SIZE_PX, np.random.default_rng(seed))
        shares.append(share_in_order(np.asarray(expert(ladder(crop, names, SEVERITIES, seed)))))
    return float(np.mean(shares))


def _batches(
    pictures: Sequence[Image.Image], batch_size: int, num_steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images [batch, 3 rungs, 3, px, px] in 0..1 and severities [batch, 3 rungs]."""
    rng = np.random.default_rng(seed)
    names = list(OPERATORS)
    for _ in range(num_steps):
        images, severities = [], []
        for _ in range(batch_size):
            crop = random_crop(pictures[int(rng.integers(len(pictures)))], SIZE_PX, rng)
            chain = list(rng.choice(names, rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]), replace=False))
            rungs = np.sort([rng.random(), rng.random(), 0.0 if rng.random() < 0.5 else rng.random()]).tolist()
            images.append(np.stack(ladder(crop, chain, rungs, int(rng.integers(2**31)))))
            severities.append(np.array(rungs))
        pixels = torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3).float() / 255.0
        yield pixels, torch.from_numpy(np.stack(severities)).float()
