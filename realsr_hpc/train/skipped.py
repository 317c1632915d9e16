"""Handles updates that were not applied: saves the batch, logs an error, and ends the run after too many in a row."""

from __future__ import annotations

import logging
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from realsr_hpc.files import as_other_files
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.parallel.pipeline import Microbatch

MAX_KEPT = 10
"""Largest number of batches saved per run: enough to inspect without filling the disk."""
logger = logging.getLogger(__name__)


def keep_skipped(folder: Path, optimiser: Optimiser, limit: int) -> None:
    """From now on keep the batches of skipped updates; RuntimeError on every rank after `limit` of them in a row."""
    groups = optimiser.groups

    def keep(microbatches: list[Microbatch]) -> None:
        """Save this data-parallel rank's microbatches. RuntimeError after too many skipped updates in a row."""
        target = folder / f"update-{optimiser.num_updates:06d}" / f"dp-{groups.dp_rank}.safetensors"
        # tensor and pipeline ranks of a replica have the same microbatches: one of them saves
        if optimiser.num_skipped <= MAX_KEPT and groups.tp_rank == 0 and groups.pp_rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(_tensors(microbatches), target)
            as_other_files(target)
        if groups.is_main:
            logger.error(
                "update %d was skipped: its gradient is not finite (%d in all); its batch is in %s",
                optimiser.num_updates,
                optimiser.num_skipped,
                target.parent,
            )
        if optimiser.skipped_in_a_row >= limit:
            raise RuntimeError(
                f"optim.max_skipped_in_a_row: {limit}: that many consecutive updates had a gradient that was not "
                f"finite; their batches are in {folder}; lower optim.lr ({optimiser.optim.lr}) or raise "
                "precision.params"
            )

    optimiser.on_skipped = keep


def _tensors(microbatches: list[Microbatch]) -> dict[str, torch.Tensor]:
    """`0.tokens`, `0.segment_ids`, `0.loss.targets`, `0.loss.rollouts.advantages`, ... of every microbatch."""
    named: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(microbatches):
        named |= _fields(str(number), batch)
    return named


def _fields(name: str, record: object) -> dict[str, torch.Tensor]:
    """The tensors of a record and of the records in it, by their dotted names."""
    if isinstance(record, torch.Tensor):
        return {name: record.contiguous()}
    if not is_dataclass(record):
        return {}
    parts = [_fields(f"{name}.{field.name}", getattr(record, field.name)) for field in fields(record)]
    return {key: value for part in parts for key, value in part.items()}
