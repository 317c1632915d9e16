"""GRPO on VLCoT rollouts. This file shows what a training step does.

    LQ images -> prompts -> a group of rollouts each, on the live policy weights -> parse, decode, rewards
      -> advantages within the group -> reference log-probs -> policy log-probs of the tokens under the distribution
         they were sampled from -> clipped loss over the global token count -> optimizer -> report, checkpoint

`step` does exactly this; `main` builds the parts and loops. As in all GRPO there is no critic. Rollouts use the live
weights: no separate inference engine has a copy of them. There is no trust region besides clipping and the KL term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.parallel.layout import microbatch_multiple
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import LQBatch, ScoredGroup, StepReport
from realsr_hpc.train.experience import BatchSource, collect, group_metrics, held_out, heldout_due
from realsr_hpc.train.kept_rollouts import keep_rollouts
from realsr_hpc.train.kept_steps import keep_step
from realsr_hpc.train.objective import check_exactness, objective
from realsr_hpc.train.parts import GRPOParts, build_grpo_parts, clock
from realsr_hpc.train.scoring import logprobs_of, with_columns
from realsr_hpc.train.training_run import Stop, TrainingRun
from realsr_hpc.train.updates import grpo_batches


def main(config: RunConfig, run_dir: Path, stop: Stop = lambda: False) -> int:
    """Run the recipe; returns the exit code (see config/exit_codes.py)."""
    grpo = config.grpo
    parts = build_grpo_parts(config)
    run = TrainingRun(parts, run_dir, stop, grpo.num_steps)
    source = training_source(parts)
    done = run.resume(source)
    heldout = heldout_images(parts)
    # a fresh run measures its start policy too, so that curves begin before training
    if done == 0 and heldout_due(grpo, 0):
        before = held_out(parts, heldout, 0)
        run.report(before, "held-out, before the first step")
        keep_rollouts(run, "heldout", before)
    for number in range(done + 1, grpo.num_steps + 1):
        report = step(parts, source, number)
        keep_rollouts(run, "train", report)
        keep_step(run, report)
        if heldout_due(grpo, number):
            after = held_out(parts, heldout, number)
            keep_rollouts(run, "heldout", after)
            report = replace(report, metrics=report.metrics | after.metrics)
        run.report(report, _text(report.metrics))
        # all ranks agree on stopping; the exit code lets the supervisor requeue the job
        if run.must_stop(number, source):
            run.tracker.close("KILLED")
            return STOPPED
    run.tracker.close("FINISHED")
    return DONE


def step(parts: GRPOParts, source: BatchSource, number: int) -> StepReport:
    """Step `number`, counted from 1: sample rollouts of the source's next images and update the policy on them."""
    seconds: dict[str, float] = {}
    parts.rewards.at_step(number)  # reward weights can follow a ramp over the steps
    # this rank's images (prompts_per_step / dp_size), each with a group of `group_size` rollouts
    groups = collect(parts, source, seconds)
    metrics = group_metrics(parts, groups, seconds["time/rollout/s"]) | learn(parts, groups, number, seconds)
    return StepReport(number, metrics | parts.slowest(seconds), tuple(groups))


def learn(parts: GRPOParts, groups: Sequence[ScoredGroup], number: int, seconds: dict[str, float]) -> dict[str, float]:
    """Update the policy on this rank's scored groups; returns the last update's metrics, and adds times to `seconds`.

    Replaying a step (train/replay.py) calls this as well. Raises InexactStep (train/objective.py) if the first update
    does not start at ratio 1.
    """
    metrics: dict[str, float] = {}
    batches = grpo_batches(parts, groups, parts.sampler.masks)  # one per update
    # each batch becomes microbatches [rows, prompt + responses + padding]
    collated = [parts.group_microbatches(batch.groups) for batch in batches]
    with clock(seconds, "score"):  # for all updates, before the first of them changes the policy
        scored = [score_before_updates(parts, microbatches) for microbatches in collated]
    with clock(seconds, "update"):
        for update, (batch, microbatches) in enumerate(zip(batches, scored, strict=True)):
            loss = objective(parts.config, parts.policy, batch, parts.sampler.masks)
            result = parts.optimiser.step(microbatches, loss)
            totals = parts.total(result.outputs)
            if update == 0:  # the weights are still those that sampled the rollouts
                check_exactness(parts.config, number, totals)
            metrics |= totals | {"optim/grad_norm/step": result.grad_norm, "optim/lr/step": result.lr}
    return metrics


def score_before_updates(parts: GRPOParts, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """Add the reference's log-probabilities, and with several updates per step the policy's own from before the
    first."""
    parallel = parts.config.parallel
    allowed = parts.sampler.masks.allowed
    scored = list(microbatches)
    with parts.as_reference() as reference:
        if reference is not None:
            # scoring stores no activations, so several microbatches fit into one pass
            at_once, multiple = parallel.scoring_microbatches, microbatch_multiple(parallel)
            logprobs = logprobs_of(reference, scored, allowed, at_once=at_once, multiple=multiple)
            scored = [with_columns(m, reference_logprobs=values) for m, values in zip(scored, logprobs, strict=True)]
    if parts.config.grpo.updates_per_step > 1:
        # later updates start from changed weights, and their ratio is taken to these log-probabilities
        logprobs = logprobs_of(parts.policy, scored, allowed)
        scored = [with_columns(m, old_logprobs=values) for m, values in zip(scored, logprobs, strict=True)]
    return scored


def training_source(parts: GRPOParts) -> LQLoader:
    """This rank's share of the `grpo.prompts_per_step` training images per step."""
    config, groups = parts.config, parts.groups
    share = parts.per_rank(config.grpo.prompts_per_step, "grpo.prompts_per_step")
    return LQLoader(config, config.data.train_split, share, dp_rank=groups.dp_rank, dp_size=groups.dp_size)


def heldout_images(parts: GRPOParts) -> LQBatch:
    """This rank's share of the split's first `grpo.heldout_prompts` images: the same whenever they are sampled."""
    config, groups = parts.config, parts.groups
    share = parts.per_rank(config.grpo.heldout_prompts, "grpo.heldout_prompts")
    rank, size = groups.dp_rank, groups.dp_size
    return LQLoader(config, config.data.heldout_split, share, dp_rank=rank, dp_size=size, shuffle=False).next()


def _text(metrics: dict[str, float]) -> str:
    text = f"reward {metrics['rewards/total/mean']:.3f}  KL {metrics.get('grpo/kl_reference/mean', 0.0):.4f}"
    return text + (f"  held-out {metrics['heldout/total/mean']:.3f}" if "heldout/total/mean" in metrics else "")
