"""Saves whole steps so that they can be replayed: `RUN_DIR/replay/step-N/`. This module owns the format.

    step.json                 step, its layout, and the metrics that it reported
    dp-0.safetensors, ...     the groups of one data-parallel rank: `0.prompt`, `0.tokens`, `0.rewards.NAME`, ... of its
                              first group, `0.places.NAME` with grpo.credit=part; the file's metadata hold weights
                              and image names

A step that is repeated after a resume overwrites its files. A full disk loses the saved step but never stops the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from realsr_hpc import runfolder
from realsr_hpc.artifacts import stored
from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.files import json_value, parse_json, replacing, write_atomically
from realsr_hpc.parallel.process_groups import ProcessGroups
from realsr_hpc.records import GroupRewards, LQBatch, RolloutGroup, ScoredGroup, StepReport, lq_pixels
from realsr_hpc.train.training_run import TrainingRun

FORMAT = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptStep:
    """One saved step."""

    number: int
    metrics: dict[str, float]
    """All metrics that the step reported."""
    ranks: tuple[tuple[ScoredGroup, ...], ...]
    """Groups of each data-parallel rank; without their traces and decoded images."""
    parallel: ParallelConfig | None
    """The layout it was computed on, which a later resume may have changed; None: saved by an earlier version."""

    def share(self, dp_rank: int, dp_size: int) -> list[ScoredGroup]:
        """Groups of one data-parallel rank: its own on the original layout, otherwise an equal share of all."""
        if dp_size == len(self.ranks):
            return list(self.ranks[dp_rank])
        groups = [group for rank in self.ranks for group in rank]
        return groups[len(groups) * dp_rank // dp_size : len(groups) * (dp_rank + 1) // dp_size]


@dataclass(frozen=True)
class _Stored:
    """The content of step.json."""

    format: int
    step: int
    dp_size: int
    metrics: dict[str, float]
    parallel: ParallelConfig | None = None


@dataclass(frozen=True)
class _StoredGroup:
    """One group in the metadata of a rank's file."""

    key: stored.Text
    """The image's name in the manifest."""
    weights: dict[str, float]
    """Weights of the reward terms at this step."""


def keep_step(run: TrainingRun, report: StepReport) -> None:
    """Save the step that was just made if `tracking.replay_every_steps` asks for it; an OSError is logged only."""
    every, groups = run.config.tracking.replay_every_steps, run.parts.groups
    if not every or report.step % every or groups.tp_rank or groups.pp_rank:
        return
    try:
        write_step(runfolder.replay(run.run_dir, report.step), report, groups, run.config.parallel)
    except OSError as error:
        logger.error("step %d could not be saved for a replay (%s); training continues", report.step, error)


def write_step(folder: Path, report: StepReport, groups: ProcessGroups, parallel: ParallelConfig) -> None:
    """Write this data-parallel rank's groups, and on the main rank step.json. OSError: not writable."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    facts = []
    for number, group in enumerate(report.groups):
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in _tensors(group).items()}
        facts.append({"key": group.source.key, "weights": group.rewards.weights})
    with replacing(folder / f"dp-{groups.dp_rank}.safetensors") as aside:
        save_file(tensors, aside, metadata={"groups": json.dumps(facts)})
    if groups.is_main:
        content = {"format": FORMAT, "step": report.step, "dp_size": groups.dp_size, "metrics": report.metrics}
        content["parallel"] = parallel.model_dump(mode="json")
        write_atomically(folder / "step.json", json.dumps(content, indent=1))


def read_step(folder: Path) -> KeptStep:
    """Read a saved step. ValueError if it is incomplete or of another format."""
    try:
        content = parse_json((folder / "step.json").read_bytes(), _Stored)
        if content.format != FORMAT:
            raise ValueError(f"format {content.format}, this version reads {FORMAT}")
        if content.dp_size < 1 or not folder.name.endswith(runfolder.step_name(content.step)):
            raise ValueError(f"step.json is of step {content.step} on {content.dp_size} ranks")
        ranks = [_read(folder / f"dp-{rank}.safetensors") for rank in range(content.dp_size)]
    except OSError as error:
        raise ValueError(f"step={folder} is incomplete ({error}); tracking.replay_every_steps saves steps") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"step={folder} is damaged ({reason}); copy it again, or name another step") from None
    return KeptStep(content.step, content.metrics, tuple(ranks), content.parallel)


def _tensors(group: ScoredGroup) -> dict[str, Tensor]:
    rollouts = {field.name: getattr(group.rollouts, field.name) for field in fields(RolloutGroup)}
    found = {
        **rollouts,
        "lq": lq_pixels([group.source]),
        "index": torch.tensor([group.source.index]),
        "advantages": group.advantages,
    }
    found |= {"total": group.rewards.total}
    found |= {f"rewards.{name}": values for name, values in group.rewards.breakdown.items()}
    found |= {f"places.{name}": values for name, values in group.rewards.places.items()}
    return {name: value.cpu() for name, value in found.items() if value is not None}


def _read(path: Path) -> tuple[ScoredGroup, ...]:
    with safe_open(path, framework="pt") as file:
        listed = stored.checked(path, json_value(file.metadata()["groups"]), list[_StoredGroup], FORMAT)
        return tuple(_group(file, number, group) for number, group in enumerate(listed))


def _group(file: safe_open, number: int, group: _StoredGroup) -> ScoredGroup:
    prefix = f"{number}."
    found = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    rollouts = RolloutGroup(**{field.name: found.get(field.name) for field in fields(RolloutGroup)})  # type: ignore[arg-type]
    breakdown = {name: found[f"rewards.{name}"] for name in group.weights}
    [source] = LQBatch(found["lq"], None, (None,), (None,), (group.key,), found["index"]).cases()
    places = {name: found[f"places.{name}"] for name in breakdown if f"places.{name}" in found}
    rewards = GroupRewards(found["total"], breakdown, group.weights, places=places)
    return ScoredGroup(source, rollouts, (), (), rewards, found.get("advantages"))


def all_groups(step: KeptStep) -> Sequence[ScoredGroup]:
    """The groups of all ranks."""
    return [group for rank in step.ranks for group in rank]
