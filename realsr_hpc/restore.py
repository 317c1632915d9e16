"""Images in, images out: a folder of low-quality images restored by a policy, each with its reasoning beside it.

Any size and format: an image is cut into overlapping tiles of the model's LQ size, every tile is restored on its own
and the results are blended. Transparency is upscaled bicubically and put back, grey stays grey, 16 bits are read as
8, EXIF rotation is applied. What is done is skipped when the command is run again, what cannot be read is reported.
Left out: context from one tile to the next; tiles see only themselves.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track

from realsr_hpc.config.load import from_yaml
from realsr_hpc.config.schema import ParallelConfig, RunConfig
from realsr_hpc.records import LQBatch, RestoredImage

if TYPE_CHECKING:
    from realsr_hpc.rollout.restorer import PolicyRestorer

Restorer = Callable[[LQBatch], list[RestoredImage]]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
SETTINGS_FILE = "restore.json"


@dataclass(frozen=True)
class RestoreSettings:
    """How an image is cut and what restores it; kept beside the results, so that they are never mixed."""

    source: str
    """What restores: the checkpoint's path."""
    tile_px: int
    """Side of a tile of the LQ image."""
    upscale: int
    overlap_px: int = 8
    """By which neighbouring tiles overlap, in LQ pixels."""
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_px <= self.tile_px // 2:
            raise ValueError(f"overlap_px={self.overlap_px} must lie in 0..{self.tile_px // 2} (half a tile)")


@dataclass
class RestoreReport:
    """What became of the files."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Why, by file."""
    num_tiles: int = 0
    num_tiles_bicubic: int = 0
    """Tiles for which the model gave no image: filled in bicubically."""

    def __str__(self) -> str:
        lines = [f"{len(self.done)} restored, {len(self.skipped)} already there, {len(self.failed)} failed"]
        if self.num_tiles_bicubic:
            lines.append(
                f"{self.num_tiles_bicubic} of {self.num_tiles} tiles are bicubic: the model gave no image there"
            )
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.failed.items()])


@dataclass(frozen=True)
class Picture:
    """A file's pixels as the model wants them, and what is needed to write them back alike."""

    rgb: np.ndarray
    """uint8 [h, w, 3]."""
    alpha: np.ndarray | None
    """uint8 [h, w]."""
    is_grey: bool
    icc_profile: bytes | None


def restore_folder(
    restorer: Restorer, source: Path, output: Path, settings: RestoreSettings, *, show_progress: bool = True
) -> RestoreReport:
    """Restore every image of a folder (or one file) into `output`: NAME.png and NAME.json.

    Raises ValueError when there is nothing to read, or `output` holds results of other settings.
    """
    files = find_images(source, output)
    if not files:
        raise ValueError(f"input={source}: no images there; known endings: {', '.join(sorted(SUFFIXES))}")
    _claim(output, settings)
    targets = _targets(files, source if source.is_dir() else source.parent, output)
    report = RestoreReport()
    for file, target in track(targets.items(), "restoring", disable=not show_progress):
        if target.exists():
            report.skipped.append(str(file))
            continue
        try:
            picture = read_picture(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's ways to refuse
            report.failed[str(file)] = f"cannot be read ({type(error).__name__}: {error})"
            continue
        _restore_file(restorer, file, picture, target, settings, report)
    return report


def restore_image(
    restorer: Restorer, rgb: np.ndarray, settings: RestoreSettings
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Restore uint8 [h, w, 3] of any size: uint8 [h * upscale, w * upscale, 3] and a record of each tile."""
    height, width = rgb.shape[:2]
    tile, scale = settings.tile_px, settings.upscale
    padded = np.pad(rgb, ((0, max(0, tile - height)), (0, max(0, tile - width)), (0, 0)), mode="symmetric")
    corners = [
        (top, left)
        for top in tile_starts(padded.shape[0], tile, settings.overlap_px)
        for left in tile_starts(padded.shape[1], tile, settings.overlap_px)
    ]
    total = np.zeros((padded.shape[0] * scale, padded.shape[1] * scale, 3))
    weight = np.zeros((*total.shape[:2], 1))
    ramp = _ramp(tile * scale, settings.overlap_px * scale)
    records = []
    for start in range(0, len(corners), settings.batch_size):
        part = corners[start : start + settings.batch_size]
        tiles = [padded[top : top + tile, left : left + tile] for top, left in part]
        for (top, left), pixels, restored in zip(part, tiles, restorer(_batch(tiles, start)), strict=True):
            image = restored.image if restored.image is not None else _bicubic(pixels, scale)
            _check_tile(image, tile * scale)
            where = (slice(top * scale, (top + tile) * scale), slice(left * scale, (left + tile) * scale))
            total[where] += image * ramp
            weight[where] += ramp
            records.append(_record(top, left, restored))
    blended = np.clip(np.round(total / weight), 0, 255).astype(np.uint8)
    return blended[: height * scale, : width * scale], records


def open_restorer(config: RunConfig, checkpoint_path: Path | None) -> PolicyRestorer:
    """A restorer of this one process; checkpoint None: the recipe's start weights.

    Raises ValueError when there is neither a checkpoint nor start weights.
    """
    if checkpoint_path is None and config.model.weights is None:
        raise ValueError("model.weights is not set and there is no checkpoint: name a run that has one")
    # Megatron takes seconds to import: not for who only reads pictures.
    from realsr_hpc import checkpoint
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.groups import initialise
    from realsr_hpc.rollout.restorer import PolicyRestorer
    from realsr_hpc.tokenizer.trace import TraceTokenizer

    precision = config.precision.model_copy(update={"fp8": "none", "rollout_fp8": False})
    config = config.model_copy(update={"parallel": ParallelConfig(), "precision": precision})
    if checkpoint_path is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    groups = initialise(config.parallel, config.seed)
    tokens = TraceTokenizer.load(config, groups.device)
    policy = build_policy(config, groups, tokens.codec.vocabulary.size, trainable=False)
    if checkpoint_path is not None:
        checkpoint.load(checkpoint_path, policy, None, groups)
    return PolicyRestorer(policy, tokens, config)


def find_run(run: str | None, checkpoint_folder: str | None) -> tuple[RunConfig, Path]:
    """Recipe and checkpoint folder of `run=RUN_DIR` (its newest checkpoint) or `checkpoint=RUN_DIR/checkpoints/STEP`.

    Raises ValueError when neither or both are given, or there is no whole checkpoint.
    """
    if (run is None) == (checkpoint_folder is None):
        raise ValueError("give either run=RUN_DIR or checkpoint=RUN_DIR/checkpoints/step-N")
    if checkpoint_folder is not None:
        path = Path(checkpoint_folder).resolve()
        return from_yaml(path.parent.parent / "recipe.yaml"), path
    run_dir = Path(run or "").resolve()
    config = from_yaml(run_dir / "recipe.yaml")
    from realsr_hpc import checkpoint

    newest = checkpoint.latest(run_dir / "checkpoints")
    if newest is None:
        raise ValueError(f"run={run_dir} has no whole checkpoint under checkpoints/; let it reach its first one")
    return config, newest


def find_images(source: Path, output: Path) -> list[Path]:
    """Images under a folder in name order, those under `output` left out; or the one file."""
    if source.is_file():
        return [source]
    inside = (path for path in sorted(source.rglob("*")) if path.is_file() and path.suffix.lower() in SUFFIXES)
    return [path for path in inside if not path.resolve().is_relative_to(output.resolve())]


def read_picture(path: Path) -> Picture:
    """Decode a file wholly; 16 bits become 8, the first frame of an animation counts."""
    with Image.open(path) as file:
        icc_profile = file.info.get("icc_profile")
        picture = ImageOps.exif_transpose(file)
        if picture.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
            picture = _to_8_bit(picture)
        has_alpha = "A" in picture.getbands() or "transparency" in picture.info
        is_grey = picture.mode in ("1", "L", "LA")
        rgba = picture.convert("RGBA" if has_alpha else "RGB")
    pixels = np.array(rgba)
    # A profile speaks of the stored colour space, which the conversion to RGB has left.
    keeps_profile = picture.mode in ("RGB", "RGBA", "L", "LA")
    return Picture(
        pixels[..., :3], pixels[..., 3] if has_alpha else None, is_grey, icc_profile if keeps_profile else None
    )


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side of `size` >= `tile`: evenly spread, overlapping by `overlap` or more."""
    if size == tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _restore_file(
    restorer: Restorer, file: Path, picture: Picture, target: Path, settings: RestoreSettings, report: RestoreReport
) -> None:
    pixels, records = restore_image(restorer, picture.rgb, settings)
    reasoning = {"input": str(file), "output": target.name, "source": settings.source, "tiles": records}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(reasoning, indent=1, ensure_ascii=False))
    _write_picture(pixels, picture, target)
    report.done.append(str(file))
    report.num_tiles += len(records)
    report.num_tiles_bicubic += sum(bool(record["bicubic"]) for record in records)


def _write_picture(pixels: np.ndarray, picture: Picture, target: Path) -> None:
    """PNG, renamed into place last: a file that exists is whole, and its reasoning is written."""
    image = Image.fromarray(pixels)
    if picture.is_grey:
        image = image.convert("L")
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha).resize(image.size, Image.Resampling.BICUBIC))
    aside = target.with_suffix(".partial")
    image.save(aside, "PNG", icc_profile=picture.icc_profile)
    os.replace(aside, target)


def _claim(output: Path, settings: RestoreSettings) -> None:
    """Note the settings in the folder; refuse a folder of other settings."""
    path = output / SETTINGS_FILE
    wanted = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    if path.exists() and (held := json.loads(path.read_text())) != wanted:
        raise ValueError(f"output={output} holds results of other settings ({held}); choose an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1))


def _targets(files: Sequence[Path], root: Path, output: Path) -> Mapping[Path, Path]:
    """Output file of each input; names that differ in their ending only keep it."""
    places = [file.relative_to(root) for file in files]
    uses = Counter(place.with_suffix("") for place in places)
    return {
        file: output / place.with_name(f"{place.name if uses[place.with_suffix('')] > 1 else place.stem}.png")
        for file, place in zip(files, places, strict=True)
    }


def _to_8_bit(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    # Pillow gives 16-bit grey as I;16 or, from some formats, as I; F holds 0..1 or 0..255.
    top = 65535.0 if picture.mode != "F" else (1.0 if values.max() <= 1.0 else 255.0)
    return Image.fromarray(np.clip(np.round(values / top * 255.0), 0, 255).astype(np.uint8))


def _ramp(side: int, overlap: int) -> np.ndarray:
    """Blending weight [side, side, 1]: rising over the overlap from every edge, never 0."""
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0
    line = np.minimum(distance / (overlap + 1.0), 1.0)
    return (line[:, None] * line[None])[..., None]


def _batch(tiles: Sequence[np.ndarray], first: int) -> LQBatch:
    """Tiles numbered within their image: the draws do not depend on which other files there are."""
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()
    unknown = (None,) * len(tiles)
    numbers = range(first, first + len(tiles))
    return LQBatch(pixels, None, unknown, unknown, tuple(map(str, numbers)), torch.tensor(list(numbers)))


def _bicubic(pixels: np.ndarray, scale: int) -> np.ndarray:
    size = (pixels.shape[1] * scale, pixels.shape[0] * scale)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _check_tile(image: np.ndarray, side: int) -> None:
    if image.shape != (side, side, 3):
        raise ValueError(f"a tile came back as {image.shape}, not {(side, side, 3)}; check tile_px and upscale")


def _record(top: int, left: int, restored: RestoredImage) -> dict[str, object]:
    trace = restored.trace
    return {
        "top": top,
        "left": left,
        "well_formed": trace.well_formed,
        "bicubic": restored.image is None,
        "degradation": trace.degradation,
        "texts": list(trace.texts),
        "faults": list(trace.faults),
    }
