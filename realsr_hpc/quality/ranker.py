"""The degradation ranker: a small CNN that rates how clean an image of about 128 px looks, without a reference.

`realsr-hpc fit-experts` trains it on the bundled training photographs: of two versions of one crop, the less degraded
one must score higher (margin ranking, after RankIQA, Liu et al. 2017). Its inputs are high-passed luma and chroma
planes, so that it cannot judge by content and exposure. It scores any image of at least 32 px.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from realsr_hpc.files import as_other_files
from realsr_hpc.formats.tensor_files import read_weights
from realsr_hpc.quality.batching import same_shapes

_MIN_PX = 32
_BATCH = 32


class Ranker(nn.Module):
    """A fully convolutional network with about 105,000 weights; scores have no fixed range."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, width, 3, stride=2, padding=1),
            nn.SiLU(),
            *(layer for out in (2, 3, 4) for layer in _block(width * (out - 1), width * out)),
        )
        self.head = nn.Linear(2 * 4 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """RGB float [n, 3, H, W] in 0..1 -> score [n], higher is cleaner."""
        return self._rated(self.body(high_pass(images)))[0]

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_file({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, path)
        as_other_files(path)

    @classmethod
    def load(cls, path: Path) -> Ranker:
        """Read what `save` wrote. Raises ValueError if the file is missing, damaged or not a ranker's."""
        if not path.is_file():
            raise ValueError(f"ranker weights {path} not found; make them: `realsr-hpc fit-experts only=ranker`")
        ranker = cls()
        weights, _ = read_weights(path)
        wanted = {name: value.shape for name, value in ranker.state_dict().items()}
        if {name: value.shape for name, value in weights.items()} != wanted:
            raise ValueError(
                f"ranker weights {path} are not those of this project's ranker; make them with realsr-hpc fit-experts"
            )
        ranker.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return ranker.eval()

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Scores [n] of RGB uint8 images [H, W, 3]; NaN for images below 32 px."""
        scores = np.full(len(images), np.nan)
        for places, stack in same_shapes(images):
            if min(stack.shape[1:3]) >= _MIN_PX:
                parts = self._pixels(stack).split(_BATCH)
                scores[places] = torch.cat([self(part) for part in parts]).double().cpu().numpy()
        return scores

    @torch.no_grad()
    def shares(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Scores [n] of images of one size, and contributions [n, h, w] of their positions (16 px apart), float64.

        A contribution is how much a position raises the score relative to the image's average position, to first order:
        the influence function of mean and spread at the position's features. Its mean over an image is 0.
        """
        weight_mean, weight_spread = self.head.weight[0].chunk(2)  # [C] each
        scores, shares = [], []
        for pixels in self._pixels(np.stack(images)).split(_BATCH):
            field = self.body(high_pass(pixels))  # [n, C, h, w]
            score, mean, spread = self._rated(field)
            centred = field - mean[..., None, None]
            squares = centred.square()
            of_spread = (squares - squares.mean(dim=(2, 3), keepdim=True)) / (2 * spread[..., None, None])
            scores.append(score)
            shares.append(
                torch.einsum("nchw,c->nhw", centred, weight_mean)
                + torch.einsum("nchw,c->nhw", of_spread, weight_spread)
            )
        return torch.cat(scores).double().cpu().numpy(), torch.cat(shares).double().cpu().numpy()

    def _rated(self, field: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [n] of features [n, C, h, w], and the features' mean and spread over positions, each [n, C]."""
        mean, spread = field.mean(dim=(2, 3)), (field.var(dim=(2, 3), unbiased=False) + 1e-4).sqrt()
        return self.head(torch.cat([mean, spread], dim=1))[:, 0], mean, spread

    def _pixels(self, stack: np.ndarray) -> Tensor:
        """Images uint8 [n, H, W, 3] as float [n, 3, H, W] in 0..1 on the network's device."""
        pixels = torch.from_numpy(np.array(stack)).to(self.head.weight.device)
        return pixels.permute(0, 3, 1, 2).float() / 255.0


def high_pass(images: Tensor) -> Tensor:
    """Luma and two chroma planes minus their mean over 3 px, and minus that over 9 px: [n, 3, H, W] -> [n, 6, H, W]."""
    red, green, blue = images.unbind(1)
    planes = torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], dim=1)
    return 4.0 * torch.cat([planes - _box(planes, 3), planes - _box(planes, 9)], dim=1)


def _box(planes: Tensor, size: int) -> Tensor:
    padded = nn.functional.pad(planes, (size // 2,) * 4, mode="replicate")
    return nn.functional.avg_pool2d(padded, size, stride=1)


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), nn.SiLU()]
