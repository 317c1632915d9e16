"""Recompute a saved step, as it was and as it would have been with another clip, weight or advantage.

The weights before step K come from the checkpoint of step K - 1, or from an earlier checkpoint (or the run's start) by
repeating the updates of the saved steps in between. From the rollouts on, a replay calls the same function as training:
`grpo.learn`. By default it uses the layout that the step was saved on, even if the run has since been resumed on
another one; every number then equals the run's bit for bit. On another layout numbers agree within `tolerance`. A
replay neither samples again nor predicts how a changed earlier step would have affected later ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc import checkpoint, runfolder
from realsr_hpc.checkpoint import integrity
from realsr_hpc.config.derived import world_size
from realsr_hpc.config.identity import may_change_on_resume
from realsr_hpc.config.load import nearest, override, written
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.grpo.advantages import configured_advantages, contributions
from realsr_hpc.records import ScoredGroup
from realsr_hpc.rewards.mixture import weight_at, weighted_total
from realsr_hpc.tracking import recipe_of
from realsr_hpc.train.grpo import learn
from realsr_hpc.train.kept_steps import KeptStep, all_groups, read_step
from realsr_hpc.train.parts import build_grpo_parts

MAY_DIFFER = (
    "clip_low", "clip_high", "dual_clip", "kl_beta", "kl_estimator", "aggregation", "importance", "advantage",
    "unbiased_std", "advantage_epsilon", "normalise_each_reward", "credit", "entropy_weight", "mismatch_cap",
    "mismatch_bounds", "updates_per_step",
)  # fmt: skip
"""Fields of `grpo` that a replay may change: those that act after the rollouts are scored."""

GATE = "grpo.mismatch_kl_gate"


@dataclass(frozen=True)
class Outcome:
    """The results of a step's updates under one recipe."""

    metrics: dict[str, float]
    """As training reports them: `grpo/loss/mean`, `optim/grad_norm/step`, ..."""
    shares: dict[str, float]
    """Share of each reward in the advantages, by name: sum of |its contribution| over that of all; 0..1."""
    advantages: Tensor
    """Of all rollouts, in the order in which they were saved."""


@dataclass(frozen=True)
class Replay:
    """A step as reported, as recomputed, and as it would have been with the overrides."""

    step: KeptStep
    again: Outcome
    other: Outcome | None
    """None: no override changes the result."""
    same_layout: bool
    tolerance: float
    """Largest relative difference from the reported numbers that another layout explains; 0 on the same one."""

    def faults(self) -> list[str]:
        """Names of the metrics that do not agree with the reported ones."""
        return [name for name, value in self.again.metrics.items() if not self.agrees(name, value)]

    def agrees(self, name: str, value: float) -> bool:
        """Whether a metric equals the reported one: bit for bit, or within `tolerance` on another layout."""
        reported = self.step.metrics.get(name)
        if reported is None or self.same_layout or not math.isfinite(value - reported):
            return is_equal(reported, value)
        return abs(value - reported) <= self.tolerance * max(abs(reported), abs(value), 1e-3)


def is_equal(reported: float | None, value: float) -> bool:
    """Whether both are the same number; NaN equals NaN, which a step reports whose update was skipped."""
    return reported == value or (reported is not None and math.isnan(reported) and math.isnan(value))


def recipes(run_dir: Path, number: int, overrides: Sequence[str]) -> tuple[KeptStep, RunConfig, RunConfig]:
    """A saved step, its recipe on the replay's layout, and that recipe with all overrides.

    ValueError if the step was not saved, or for an override that a replay does not support.
    """
    config = recipe_of(run_dir)
    if config.task != "grpo":
        raise ValueError(f"run={run_dir}: its task is {config.task}; only steps of GRPO are kept and replayed")
    keys = {line: line.partition("=")[0] for line in overrides}
    elsewhere = {
        key for key in keys.values() if key.startswith(("parallel.", "cluster.")) and may_change_on_resume(key)
    } | {GATE}  # the gate changes no number, it only decides whether the replay stops
    layout = [line for line, key in keys.items() if key in elsewhere]
    terms = config.rewards.terms
    allowed = {f"grpo.{name}" for name in MAY_DIFFER} | {f"rewards.terms.{name}.weight" for name in terms}
    for line, key in keys.items():
        if key not in allowed | elsewhere:
            hint = nearest(key, allowed).removeprefix("; ")
            raise ValueError(
                f"{line}: {hint and hint + ' '}a replay may change parallel.*, cluster.*, {GATE}, "
                f"{', '.join(sorted(allowed))}"
            )
    if number not in (kept := runfolder.replay_steps(run_dir)):
        there = ", ".join(map(str, kept)) or "none"
        raise ValueError(f"step={number} was not saved; saved steps: {there}; tracking.replay_every_steps saves them")
    step = read_step(runfolder.replay(run_dir, number))
    config = _on_layout_of(step, config)
    return step, override(config, layout), override(config, list(overrides))


def _on_layout_of(step: KeptStep, config: RunConfig) -> RunConfig:
    """The recipe as it was when the step was computed, on as many processes."""
    if step.parallel is None:
        return config
    lines = [f"parallel.{name}={written(value)}" for name, value in step.parallel.model_dump(mode="json").items()]
    processes, tasks = step.parallel.tp * step.parallel.pp * len(step.ranks), config.cluster.tasks_per_node
    if processes != world_size(config):
        nodes, tasks = (1, processes) if processes % tasks else (processes // tasks, tasks)
        lines += [f"cluster.nodes={nodes}", f"cluster.tasks_per_node={tasks}"]
    return override(config, lines)


def replay(run_dir: Path, number: int, overrides: Sequence[str]) -> Replay:
    """Recompute step `number`; every rank of the layout calls it. ValueError if something is missing."""
    step, config, other = recipes(run_dir, number, overrides)
    start = starting_point(run_dir, number)
    again, same = _outcome(run_dir, step, start, config, config)
    changed = None if other == config else _outcome(run_dir, step, start, config, other)[0]
    return Replay(step, again, changed, same, 0.0 if same else tolerance(config))


def tolerance(config: RunConfig) -> float:
    """Relative tolerance on another layout, which sums in another order at the policy's precision."""
    return {"fp32": 1e-3, "bf16": 5e-2}[config.precision.params]


def starting_point(run_dir: Path, number: int) -> Path | None:
    """The newest checkpoint from which saved steps lead up to this step; None: they lead from the run's start.

    ValueError: some of the steps in between were not saved.
    """
    saved = {runfolder.step_of(path): path for path in integrity.completed(runfolder.checkpoints(run_dir))}
    kept = set(runfolder.replay_steps(run_dir))
    for step in sorted({0, *saved}, reverse=True):
        if step < number and kept.issuperset(range(step + 1, number)):
            return saved.get(step)
    raise ValueError(
        f"step={number}: no checkpoint of step {number - 1}, and the steps since an earlier one (available: "
        f"{', '.join(map(str, sorted(saved))) or 'none'}) are not all saved; keep more checkpoints "
        "with checkpoint.keep_last, or save every step with tracking.replay_every_steps=1"
    )


def _outcome(
    run_dir: Path, step: KeptStep, start: Path | None, config: RunConfig, other: RunConfig
) -> tuple[Outcome, bool]:
    """Update with recipe `other` from the weights that `config` led to; also whether every step was on its layout."""
    # built once for both recipes, with a reference if either of them has a KL term
    beta = max(config.grpo.kl_beta, other.grpo.kl_beta)
    built = build_grpo_parts(config.model_copy(update={"grpo": config.grpo.model_copy(update={"kl_beta": beta})}))
    as_run = replace(built, config=config, reference=built.reference if config.grpo.kl_beta else None)
    groups, done, steps = built.groups, 0, [step]
    if start is not None:
        checkpoint.refuse_damaged(start, groups)
        done = checkpoint.load(start, built.policy, built.optimiser, groups).step
    for number in range(done + 1, step.number):  # repeat the updates between the checkpoint and the step
        before = read_step(runfolder.replay(run_dir, number))
        steps.append(before)
        learn(as_run, before.share(groups.dp_rank, groups.dp_size), number, {})
    parts = replace(built, config=other, reference=built.reference if other.grpo.kl_beta else None)
    weights = {name: weight_at(term, step.number) for name, term in other.rewards.terms.items()}
    everyone = [reweighted(group, weights, other) for group in all_groups(step)]
    mine = [reweighted(group, weights, other) for group in step.share(groups.dp_rank, groups.dp_size)]
    metrics = learn(parts, mine, step.number, {})
    # steps saved by earlier versions do not state their layout: it is the recipe's
    unsaid = recipe_of(run_dir).parallel
    same = {((kept.parallel or unsaid), len(kept.ranks)) for kept in steps} == {(other.parallel, groups.dp_size)}
    advantages = torch.cat([group.advantages for group in everyone if group.advantages is not None])
    return Outcome(metrics, shares(everyone, other), advantages), same


def reweighted(group: ScoredGroup, weights: Mapping[str, float], config: RunConfig) -> ScoredGroup:
    """The group with totals and advantages that follow from these reward weights and the recipe's `grpo` fields."""
    scores = {name: column.double().numpy() for name, column in group.rewards.breakdown.items()}
    rewards = replace(group.rewards, total=weighted_total(scores, weights), weights=dict(weights))
    return replace(
        group, rewards=rewards, advantages=configured_advantages(rewards.breakdown, rewards.weights, config.grpo)
    )


def shares(groups: Sequence[ScoredGroup], config: RunConfig) -> dict[str, float]:
    """Share of each reward in the groups' advantages by magnitude: they sum to 1, or are all 0 without advantages."""
    sums: dict[str, float] = {}
    for group in groups:
        for name, part in contributions(group.rewards.breakdown, group.rewards.weights, config.grpo).items():
            sums[name] = sums.get(name, 0.0) + float(part.double().abs().sum())
    whole = sum(sums.values())
    return {name: value / whole if whole else 0.0 for name, value in sums.items()}
