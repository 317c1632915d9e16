"""Restores images of any size with a model of one fixed size: cuts overlapping tiles, restores and blends them.

Tiles are independent: no context passes from one to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from realsr_hpc.artifacts.restoration import RestoredTile
from realsr_hpc.config.learning import ColourFix
from realsr_hpc.config.restoring import refuse_wide_overlap
from realsr_hpc.parallel import backend
from realsr_hpc.records import Case, RestoredImage
from realsr_hpc.restore.candidates import Chosen
from realsr_hpc.restore.colour import fix_colour
from realsr_hpc.restore.image_files import resized
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES

Restorer = Callable[[Sequence[Case]], list[RestoredImage]]
STEPS = IMAGE_NAMES[:-1]
"""Names of the intermediate images: rough, middle."""


@dataclass(frozen=True)
class RestoreSettings:
    """How an image is cut into tiles, and which model restores them.

    Stored with the results, so that results of different settings never mix.
    """

    source: str
    """The model that restores (`origin_of`), and its sampling settings."""
    tile_px: int
    """Side of a tile of the LQ image."""
    model_upscale: int
    """Factor that the model was trained for."""
    upscale: float = 0.0
    """Factor of the result, from 1 to the model's; 0: the model's."""
    overlap_px: int = 4
    """Overlap of neighbouring tiles in LQ pixels."""
    colour: ColourFix = "none"
    batch_size: int = 64
    """Largest number of tiles per batch; tiles of several small images share a batch."""
    workers: int = 1
    """Number of batches restored in parallel, each in its own thread."""

    def __post_init__(self) -> None:
        refuse_wide_overlap(self.overlap_px, self.tile_px)
        if self.upscale and not 1 <= self.upscale <= self.model_upscale:
            raise ValueError(f"upscale={self.upscale:g} must be in 1..{self.model_upscale}, the model's factor")

    @property
    def factor(self) -> float:
        """Output side over input side."""
        return self.upscale or float(self.model_upscale)


@dataclass(frozen=True)
class Blended:
    """A restored image of any size; RGB uint8."""

    image: np.ndarray
    """[round(h factor), round(w factor), 3]."""
    steps: dict[str, np.ndarray]
    """Images of `STEPS`, blended from the tiles in the same way, at their own size."""
    tiles: tuple[RestoredTile, ...]
    """The model's reasoning for each tile."""


def restore_images(
    restorer: Restorer,
    images: Sequence[np.ndarray],
    settings: RestoreSettings,
    on_tiles: Callable[[int], None] = lambda count: None,
) -> list[Blended]:
    """Restore images uint8 [h, w, 3] of any size; their tiles share batches.

    on_tiles: called with the number of tiles of each finished batch.

    A tile's random draws depend on its number within the image, not on other images or the number of workers. Rounding
    follows the shapes of batches: in float32 a few of 100,000 pixel values differ by one level. In bf16 tokens may
    differ, also between calls, because look-ahead chooses its width by measured speed.
    """
    canvases = [_Canvas(image, settings) for image in images]
    work = [(canvas, number) for canvas in canvases for number in range(len(canvas.corners))]
    parts = [work[start:stop] for start, stop in itertools.pairwise(_bounds(len(work), settings))]
    batches = ([Case(str(n), canvas.tile(n), index=n) for canvas, n in part] for part in parts)
    for part, results in zip(parts, _restored(restorer, batches, settings.workers), strict=True):
        for (canvas, number), restored in zip(part, results, strict=True):
            canvas.add(number, restored)
        on_tiles(len(part))
    return [canvas.finish() for canvas in canvases]


def restore_cases(restorer: Restorer, cases: Sequence[Case], settings: RestoreSettings) -> list[RestoredImage]:
    """Restore cases of the model's input size, batched and distributed over threads as `restore_images` does tiles.

    The final images are corrected as `settings.colour` says.
    """
    parts = (list(cases[start:stop]) for start, stop in itertools.pairwise(_bounds(len(cases), settings)))
    results = itertools.chain.from_iterable(_restored(restorer, parts, settings.workers))
    return [_corrected(case, item, settings.colour) for case, item in zip(cases, results, strict=True)]


def _corrected(case: Case, item: RestoredImage, how: ColourFix) -> RestoredImage:
    if item.image is None:
        return item
    return replace(item, images=(*item.images[:-1], fix_colour(item.image, case.lq, how)))


def _bounds(count: int, settings: RestoreSettings) -> list[int]:
    """Boundaries of the batches: about equally large, the same number for each worker, none above `batch_size`."""
    if not count:
        return [0]
    # every worker gets the same number of batches, so that none waits for another
    rounds = -(-count // (settings.batch_size * settings.workers))
    batches = min(count, rounds * settings.workers)
    return [count * number // batches for number in range(batches + 1)]


def _restored(restorer: Restorer, batches: Iterator[list[Case]], workers: int) -> Iterator[list[RestoredImage]]:
    """Results in the order of the batches."""
    if workers == 1:
        yield from map(restorer, batches)
        return
    with backend.one_thread_each() as prepare, ThreadPoolExecutor(workers, initializer=prepare) as pool:
        yield from pool.map(restorer, batches)


def count_tiles(height: int, width: int, settings: RestoreSettings) -> int:
    """Number of tiles of an image of this size in px."""
    sides = (max(side, settings.tile_px) for side in (height, width))
    down, across = (len(tile_starts(side, settings.tile_px, settings.overlap_px)) for side in sides)
    return down * across


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Start of each tile along a side of `size` >= `tile` px: evenly spaced, overlapping by at least `overlap` px."""
    if size == tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


class _Canvas:
    """One image: its tiles, and the weighted sums that become the result."""

    def __init__(self, rgb: np.ndarray, settings: RestoreSettings):
        self.rgb, self.settings = rgb, settings
        height, width = rgb.shape[:2]
        tile, overlap = settings.tile_px, settings.overlap_px
        self.padded = np.pad(rgb, ((0, max(0, tile - height)), (0, max(0, tile - width)), (0, 0)), mode="symmetric")
        tops, lefts = (tile_starts(side, tile, overlap) for side in self.padded.shape[:2])
        self.corners = [(top, left) for top in tops for left in lefts]
        self.final = _Sum(self.padded.shape, settings, settings.model_upscale)
        self.steps: dict[str, _Sum] = {}
        self.tiles: list[RestoredTile] = []

    def tile(self, number: int) -> np.ndarray:
        """LQ pixels [tile, tile, 3]."""
        top, left = self.corners[number]
        return self.padded[top : top + self.settings.tile_px, left : left + self.settings.tile_px]

    def add(self, number: int, restored: RestoredImage) -> None:
        """Add a restored tile to the sums; a bicubic one if the model gave no image. ValueError for a wrong size."""
        corner, side = self.corners[number], self.settings.tile_px * self.settings.model_upscale
        image = restored.image if restored.image is not None else resized(self.tile(number), side, side)
        if image.shape != (side, side, 3):
            raise ValueError(f"a restored tile is {image.shape}, not {(side, side, 3)}; check tile_px and upscale")
        self.final.add(corner, image)
        for name, step in zip(STEPS, restored.images, strict=False):
            if step is not None:
                scale = max(1, step.shape[0] // self.settings.tile_px)
                total = self.steps.setdefault(name, _Sum(self.padded.shape, self.settings, scale))
                total.add(corner, resized(step, *[scale * self.settings.tile_px] * 2))
        self.tiles.append(_restored_tile(corner, restored))

    def finish(self) -> Blended:
        """The blended result without padding, with the colour fix, resized to `RestoreSettings.factor`."""
        height, width = self.rgb.shape[:2]
        large = fix_colour(self.final.blended(height, width), self.rgb, self.settings.colour)
        factor = self.settings.factor
        image = resized(large, round(height * factor), round(width * factor))  # factor >= 1: never empty
        steps = {name: total.blended(height, width) for name, total in self.steps.items()}
        return Blended(image, steps, tuple(self.tiles))


class _Sum:
    """Weighted sum of tiles at `scale` times the LQ size; weights rise linearly from a tile's edge over the overlap."""

    def __init__(self, shape: tuple[int, ...], settings: RestoreSettings, scale: int):
        self.scale = scale
        self.total = np.zeros((shape[0] * scale, shape[1] * scale, 3), np.float32)
        self.weight = np.zeros((*self.total.shape[:2], 1), np.float32)
        # [tile, tile, 1]: 1 inside, falling linearly to 1 / (overlap + 1) at the edges
        distance = np.minimum(np.arange(settings.tile_px * scale), np.arange(settings.tile_px * scale)[::-1]) + 1.0
        line = np.minimum(distance / (settings.overlap_px * scale + 1.0), 1.0).astype(np.float32)
        self.ramp = (line[:, None] * line[None])[..., None]

    def add(self, corner: tuple[int, int], image: np.ndarray) -> None:
        """Add a tile, [tile x scale, tile x scale, 3]; corner: its top and left in LQ pixels."""
        top, left = (place * self.scale for place in corner)
        where = (slice(top, top + image.shape[0]), slice(left, left + image.shape[1]))
        self.total[where] += image * self.ramp
        self.weight[where] += self.ramp

    def blended(self, height: int, width: int) -> np.ndarray:
        """uint8 result for the first `height` x `width` LQ pixels; grey where no tile was added.

        Destroys the sums, which alone take gigabytes for a large photograph.
        """
        empty = self.weight[..., 0] == 0
        self.weight[empty] = 1.0
        self.total[empty] = 128.0
        self.total /= self.weight
        whole = np.clip(np.round(self.total, out=self.total), 0, 255, out=self.total).astype(np.uint8)
        return whole[: height * self.scale, : width * self.scale]


def _restored_tile(corner: tuple[int, int], restored: RestoredImage) -> RestoredTile:
    trace = restored.trace
    tile = RestoredTile(
        top=corner[0],
        left=corner[1],
        well_formed=trace.well_formed,
        bicubic=restored.image is None,
        degradation=trace.degradation,
        texts=trace.texts,
        faults=trace.faults,
    )
    if not isinstance(restored, Chosen):
        return tile
    scores = tuple(round(score, 4) if np.isfinite(score) else float("nan") for score in restored.scores)
    return replace(tile, chosen=restored.chosen, scores=scores)
