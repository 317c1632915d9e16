"""GRPO on VLCoT rollouts: read this file to know what a step does.

    LQ images -> prompts -> a group of rollouts each, on the live policy weights -> parse, decode, rewards
      -> advantages within the group -> reference log-probs -> policy log-probs UNDER THE SAME BEHAVIOUR DISTRIBUTION
      -> clipped loss over the global token count -> optimizer -> report, checkpoint

Left out of what others do: a critic, a second inference engine and its weight refit, a trust region beyond clipping.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.grpo.loss import GlobalCounts, mismatch, policy_loss
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.parallel.layout import microbatch_multiple
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch
from realsr_hpc.parallel.reduce import reduce_floats
from realsr_hpc.records import GRPOBatch, StepReport
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.train.batches import loss_mask, to_rows
from realsr_hpc.train.experience import Experience, group_metrics, grpo_batches
from realsr_hpc.train.run import DONE, REQUEUE, Stop, TrainingRun
from realsr_hpc.train.scoring import add_logprobs, nothing_to_score, score_microbatch
from realsr_hpc.vlcot.grammar import Grammar


def main(config: RunConfig, run_dir: Path, stop: Stop = lambda: False) -> int:
    """Run the recipe; the exit code (see train/run.py)."""
    grpo = config.grpo
    run = TrainingRun(config, run_dir, stop, grpo.num_steps, grpo.num_steps * grpo.updates_per_step)
    reference = build_policy(config, run.groups, run.vocabulary.size, trainable=False) if grpo.kl_beta > 0 else None
    if reference is not None and run.parity is not None:
        run.parity.watch(reference)
    sampler = Sampler(run.policy, Grammar(run.tokens.codec, config.rollout.grammar), config.rollout, config.seed)
    experience = Experience(run, sampler, RewardMixture(config.rewards))
    loader = _loader(run, config.data.train_split, run.per_rank(grpo.prompts_per_step, "grpo.prompts_per_step"))
    done = run.resume(loader)
    heldout = _loader(
        run, config.data.heldout_split, run.per_rank(grpo.heldout_prompts, "grpo.heldout_prompts"), shuffle=False
    )
    fixed = heldout.next()
    if done == 0 and grpo.heldout_every_steps:
        run.report(StepReport(0, experience.heldout(fixed)), "held-out, before the first step")
        experience.keep(0, "heldout")

    for step in range(done + 1, grpo.num_steps + 1):
        seconds: dict[str, float] = {}
        experience.rewards.at_step(step)
        with _clock(seconds, "rollout"):
            groups = experience.collect(loader)
        experience.keep(step, "train")
        metrics = group_metrics(run, groups, seconds["time/rollout/s"])
        updates = [(batch, run.group_microbatches(batch.sequences)) for batch in grpo_batches(run, groups, sampler)]
        with _clock(seconds, "score"):
            for _, microbatches in updates:
                score_before_updates(run, reference, sampler.masks, microbatches)
        with _clock(seconds, "update"):
            for number, (batch, microbatches) in enumerate(updates):
                result = run.optimiser.step(microbatches, objective(config, run.policy, batch, sampler.masks))
                totals = run.total(result.outputs)
                if number == 0:
                    check_exactness(config, step, totals)
                metrics |= totals | {"optim/grad_norm/step": result.grad_norm, "optim/lr/step": result.lr}
        if grpo.heldout_every_steps and (step % grpo.heldout_every_steps == 0 or step == grpo.num_steps):
            with _clock(seconds, "heldout"):
                metrics |= experience.heldout(fixed)
            experience.keep(step, "heldout")
        metrics |= reduce_floats(seconds, run.groups.dp, run.groups.device, "max")
        run.report(StepReport(step, metrics), _text(metrics))
        if run.must_stop(step, loader):
            run.tracker.close("KILLED")
            return REQUEUE
    run.tracker.close("FINISHED")
    return DONE


def score_before_updates(
    run: TrainingRun, reference: Policy | None, masks: MaskTable, microbatches: list[Microbatch]
) -> None:
    """Reference log-probs, and with several updates a step the policy's own before the first of them."""
    if reference is not None:
        reference.offload(to_host=False)
        parallel = run.config.parallel
        multiple, at_once = microbatch_multiple(parallel), parallel.scoring_microbatches
        add_logprobs(reference, microbatches, masks, "reference_logprobs", at_once=at_once, multiple=multiple)
        if parallel.reference_offload:
            reference.offload(to_host=True)
    if run.config.grpo.updates_per_step > 1:
        add_logprobs(run.policy, microbatches, masks, "old_logprobs")


def objective(config: RunConfig, policy: Policy, batch: GRPOBatch, masks: MaskTable) -> LossFunction:
    """Loss function of one update: a microbatch's part of the policy loss, and its metrics."""
    counts = GlobalCounts(batch.num_tokens_global, batch.num_rollouts_global, config.rollout.max_new_tokens)
    with_entropy = config.grpo.entropy_weight != 0.0

    def loss_fn(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        extras = microbatch.extras
        if not extras:
            return nothing_to_score(hidden, output_weight), {}
        scores = score_microbatch(hidden, output_weight, microbatch, masks.allowed, policy, with_entropy=with_entropy)
        rows = {name: to_rows(extras[name], extras) for name in extras if name.endswith("_logprobs")}
        mask, logprobs = loss_mask(extras), to_rows(scores.logprobs, extras)
        terms = policy_loss(
            logprobs,
            rows["rollout_logprobs"],
            extras["advantages"],
            mask,
            rows.get("reference_logprobs"),
            counts=counts,
            config=config.grpo,
            old_logprobs=rows.get("old_logprobs"),
            entropy=to_rows(scores.entropy, extras) if with_entropy else None,
        )
        start = rows.get("old_logprobs", logprobs)
        drift = mismatch(rows["rollout_logprobs"], start, mask)
        per_token = {"rollout/mismatch_kl": drift.kl_sum, "rollout/mismatch_abs": drift.abs_sum}
        return terms.loss, terms.metrics | {name: value / counts.num_tokens for name, value in per_token.items()}

    return loss_fn


def check_exactness(config: RunConfig, step: int, first: dict[str, float]) -> None:
    """Stop a run whose sampler and trainer disagree, or whose updates do not start at ratio 1, the first also at KL 0.

    `first` holds the metrics of the step's first update. Every number here is an invariant of the method; going on
    would train on noise (PEERS: the mismatch grows).
    """
    gate, drift = config.grpo.mismatch_kl_gate, first.get("rollout/mismatch_kl", 0.0)
    if gate is not None and not drift <= gate:
        raise RuntimeError(
            f"step {step}: KL(rollout || policy) is {drift:.3g} nats a token, above grpo.mismatch_kl_gate={gate}: "
            "sampler and scorer disagree; lower rollout precision, or raise the gate if this drift is known"
        )
    ratio = first.get("grpo/ratio/mean", 1.0)
    if not abs(ratio - 1.0) <= 1e-5:
        raise AssertionError(f"step {step}: the mean ratio of its first update is {ratio}, not 1: the policy changed")
    divergence = first.get("grpo/kl_reference/mean", 0.0)
    if step == 1 and not abs(divergence) <= rounding(config):
        raise AssertionError(f"first update: KL(policy || reference) is {divergence}, not 0; their weights differ")


def rounding(config: RunConfig) -> float:
    """KL in nats a token that number formats alone can put between two scorings with the same weights."""
    if config.precision.fp8 != "none":
        return 1e-2  # the reference's scales come from other batches
    return {"fp32": 1e-5, "bf16": 1e-3}[config.precision.params]


def _loader(run: TrainingRun, split: str, batch_size: int, *, shuffle: bool = True) -> LQLoader:
    groups = run.groups
    return LQLoader(run.config, split, batch_size, dp_rank=groups.dp_rank, dp_size=groups.dp_size, shuffle=shuffle)


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[f"time/{name}/s"] = time.perf_counter() - start


def _text(metrics: dict[str, float]) -> str:
    text = f"reward {metrics['rewards/total/mean']:.3f}  KL {metrics.get('grpo/kl_reference/mean', 0.0):.4f}"
    return text + (f"  held-out {metrics['heldout/total/mean']:.3f}" if "heldout/total/mean" in metrics else "")
