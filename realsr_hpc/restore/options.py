"""Opens a restorer from the `key=value` options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from realsr_hpc.config.arguments import read_count
from realsr_hpc.config.restoring import check_restoring, refuse_what_does_not_fit
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.parallel import backend
from realsr_hpc.restore.candidates import BestOf, build_chooser
from realsr_hpc.restore.model import open_restorer, origin_of
from realsr_hpc.restore.tiles import Restorer, RestoreSettings

MEMORY_SHARE = 0.5
"""Share of the free memory that keys and values may use; the rest is for activations and images."""


def open_with_options(
    given: Mapping[str, str | None],
    config: RunConfig,
    checkpoint: Path | None,
    name: str = "",
    *,
    upscale: float = 0.0,
    batch_size: int = 0,
    steps: bool = True,
) -> tuple[Restorer, RestoreSettings]:
    """Restorer and settings from candidates=, choose=, weights_dir= and overlap_px=, and the recipe.

    A wrong value raises ValueError before anything is loaded.

    Args:
        given: the options by name.
        config: recipe of the model.
        checkpoint: its checkpoint; None: the recipe's start weights.
        name: the model's name for the settings and records.
        upscale: see `RestoreSettings`.
        batch_size: see `RestoreSettings`; 0: the largest that speeds up decoding and fits the free memory.
        steps: also decode the rough and middle images.
    """
    check_restoring(given)
    refuse_what_does_not_fit(given, config)
    count, choice = read_count(given, "candidates", 1), given["choose"] or ""
    factor, expert = config.vlcot.upscale, None
    source = f"{origin_of(name)} {config.restore.model_dump(exclude_none=True)}"
    if count > 1:
        source += f" best of {count} by {choice}"
        expert = build_chooser(choice, given["weights_dir"])
    tile_px = config.vlcot.image_sizes_px[-1] // factor
    settings = RestoreSettings(source, tile_px, factor, upscale, read_count(given, "overlap_px"), config.restore.colour)
    restorer = open_restorer(config, checkpoint, with_steps=steps)
    device = restorer.policy.groups.device
    workers = backend.workers(device)
    batch_size = batch_size or _batch_size(device, count, count * restorer.image_bytes(), workers)
    settings = replace(settings, batch_size=batch_size, workers=workers)
    return (restorer if count == 1 else BestOf(restorer, count, expert)), settings


def _batch_size(device: torch.device, count: int, tile_bytes: int, workers: int) -> int:
    """Tiles per batch, with `count` candidates each: the most that still speed up decoding and fit the free memory."""
    fitting = int(MEMORY_SHARE * backend.free_bytes(device) / workers / tile_bytes)
    return max(1, min(backend.rows_at_once(device) // count, fitting))
