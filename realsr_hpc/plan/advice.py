"""Finds changes of a recipe that lower its memory: every single change, and a sequence of changes that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from realsr_hpc.config.checks import faults
from realsr_hpc.config.derived import world_size
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.estimate import Plan, plan


@dataclass(frozen=True)
class Knob:
    """One change, as command-line overrides, with the changed recipe and its plan."""

    overrides: tuple[str, ...]
    config: RunConfig
    plan: Plan


def knobs(config: RunConfig) -> list[Knob]:
    """Every single change that lowers the peak and gives a valid recipe; those that fit first, by GPU time per step."""
    now = plan(config).total_gib
    tried = [_turned(config, changes) for changes in _changes(config)]
    useful = [knob for knob in tried if knob is not None and knob.plan.total_gib < now - 0.05]
    return sorted(useful, key=lambda knob: (knob.plan.fits is False, knob.plan.step_s * knob.plan.world_size))


def way_to_fit(config: RunConfig) -> list[Knob]:
    """A sequence of changes after which the recipe fits; empty if none was found or none is needed.

    Greedy: takes the fastest change that makes it fit, and while there is none, the one that saves the most memory.
    """
    way: list[Knob] = []
    while plan(config).fits is False:
        choices = knobs(config)
        if not choices:
            return []
        fitting = [knob for knob in choices if knob.plan.fits]
        way.append(fitting[0] if fitting else min(choices, key=lambda knob: knob.plan.total_gib))
        config = way[-1].config
    return way


def _changes(config: RunConfig) -> Iterator[dict[str, object]]:
    parallel, rollout, cluster = config.parallel, config.rollout, config.cluster
    if parallel.recompute == "none":
        yield {"parallel.recompute": "selective"}
    if parallel.recompute != "full":
        yield {"parallel.recompute": "full"}
    if not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if not parallel.distributed_optimizer:
        yield {"parallel.distributed_optimizer": True}
    if not parallel.reference_offload and config.model.lora is None:
        yield {"parallel.reference_offload": True}
    if parallel.microbatch_tokens > config.model.max_sequence_tokens:
        yield {"parallel.microbatch_tokens": config.model.max_sequence_tokens}
    if parallel.scoring_microbatches > 1:
        yield {"parallel.scoring_microbatches": 1}
    if config.task == "grpo" and rollout.batch_size > config.grpo.group_size:
        yield {"rollout.batch_size": max(config.grpo.group_size, rollout.batch_size // 2)}
    if config.task == "sft" and config.sft.packing:
        yield {"sft.packing": False}
    if config.optim.main_params == "fp32" and config.precision.params == "bf16":
        yield {"optim.main_params": "bf16"}
    if not config.optim.cpu_offload:
        yield {"optim.cpu_offload": True}
    yield {"parallel.tp": 2 * parallel.tp}
    yield {"parallel.pp": 2 * parallel.pp}
    if parallel.pp > 1:
        yield {"parallel.tp": 2 * parallel.tp, "parallel.pp": parallel.pp // 2}
    if cluster.kind == "slurm":
        yield {"cluster.nodes": 2 * cluster.nodes}


def _turned(config: RunConfig, changes: dict[str, object]) -> Knob | None:
    tree = config.model_dump()
    for path, value in changes.items():
        section, name = path.split(".")
        tree[section][name] = value
    turned = RunConfig.model_validate(tree)
    if faults(turned) or world_size(turned) < turned.parallel.tp * turned.parallel.pp:
        return None
    written = tuple(f"{path}={str(value).lower()}" for path, value in changes.items())
    return Knob(written, turned, plan(turned))
