"""Converts images and texts to tokens, and code grids back to pixels, with both tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from realsr_hpc.config.derived import PIXELS_AT_ONCE
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.records import DegradationLabel, LQBatch, SceneText
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from realsr_hpc.tokenizer.text import TextTokenizer
from realsr_hpc.vlcot.sequence import Trace, TraceCodec
from realsr_hpc.vlcot.vocabulary import build_vocabulary


class TraceTokenizer:
    """Builds prompts and traces and decodes images, with the tokenizers of one recipe."""

    def __init__(self, codec: TraceCodec, image: ImageTokenizer, device: torch.device):
        self.codec, self.image, self.device = codec, image, device

    @classmethod
    def load(cls, config: RunConfig, device: torch.device) -> TraceTokenizer:
        """Both tokenizers from the recipe's files."""
        codes = config.image_tokenizer.codebook_size
        text = TextTokenizer(config.text_tokenizer.path, build_vocabulary(config.vlcot, codes, 0).text_first)
        vocabulary = build_vocabulary(config.vlcot, codes, text.vocab_size)
        codec = TraceCodec(config.vlcot, vocabulary, text, config.image_tokenizer.downsample)
        return cls(codec, load_image_tokenizer(config.image_tokenizer, device).eval(), device)

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B 3 h w"], size_px: int) -> Int[np.ndarray, "B side side"]:
        """Code grids of images that are resized to `size_px`; side = size_px / downsample."""
        parts = images.split(_images_at_once(size_px))
        codes = [self.image.encode(shown_at(part.to(self.device), size_px)).cpu() for part in parts]
        return torch.cat(codes).numpy()

    def prompts(self, lq: UInt8[Tensor, "B 3 h w"]) -> Int[Tensor, "B L"]:
        """L prompt tokens per image, with each LQ image resized to the recipe's `vlcot.lq_size_px`."""
        grids = self.encode(lq, self.codec.config.lq_size_px)
        return torch.tensor([self.codec.prompt(grid) for grid in grids])

    def responses(self, batch: LQBatch) -> list[list[int] | None]:
        """Response tokens of each image's true trace; None if its truth, label or texts are unknown."""
        if batch.gt is None:
            return [None] * len(batch)
        stages = [self.encode(batch.gt, size) for size in self.codec.config.image_sizes_px]
        rows = zip(batch.labels, batch.scenes, *stages, strict=True)
        return [self._response(label, scene, grids) for label, scene, *grids in rows]

    def _response(
        self, label: DegradationLabel | None, scene: SceneText | None, grids: Sequence[np.ndarray]
    ) -> list[int] | None:
        if label is None or scene is None:
            return None
        return self.codec.build(Trace(label.phrase, scene.captions, tuple(grids)))  # type: ignore[arg-type]

    @torch.no_grad()
    def decode(self, grids: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """The image uint8 [H, W, 3] of each grid; None stays None. Grids of equal shape are decoded in one batch."""
        images: list[np.ndarray | None] = [None] * len(grids)
        shapes = {grid.shape for grid in grids if grid is not None}
        for shape in sorted(shapes):
            rows = [row for row, grid in enumerate(grids) if grid is not None and grid.shape == shape]
            # [n, h, w] codes -> parts that fit into memory -> pixels [n, H, W, 3]
            codes = torch.from_numpy(np.stack([grid for row in rows if (grid := grids[row]) is not None]))
            parts = codes.split(_images_at_once(shape[0] * self.codec.downsample))
            decoded = [to_uint8(self.image.decode(part.to(self.device))).movedim(1, -1).cpu() for part in parts]
            pixels = torch.cat(decoded).numpy()
            for row, image in zip(rows, pixels, strict=True):
                images[row] = image
        return images


def _images_at_once(size_px: int) -> int:
    return max(1, PIXELS_AT_ONCE // size_px**2)


def shown_at(images: UInt8[Tensor, "B 3 h w"], size_px: int) -> Float[Tensor, "B 3 size size"]:
    """Resize to a square (bicubic, antialiased); 0..255 becomes [-1, 1]."""
    pixels = images.float() / 127.5 - 1.0
    if images.shape[-2:] != (size_px, size_px):
        pixels = F.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(-1.0, 1.0)


def to_uint8(pixels: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """[-1, 1] to 0..255, rounded."""
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
