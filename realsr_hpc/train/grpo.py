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

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.grpo.loss import GlobalCounts, mismatch, policy_loss
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch
from realsr_hpc.parallel.reduce import reduce_floats
from realsr_hpc.records import GRPOBatch, StepReport
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.sampler import MaskTable, Sampler
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
        with _clock(seconds, "rollout"):
            groups = experience.collect(loader)
        experience.keep(step, "train")
        metrics = group_metrics(run, groups, seconds["time/rollout/s"])
        updates = [
            (batch, run.microbatches(batch.sequences, packing=False)) for batch in grpo_batches(run, groups, sampler)
        ]
        with _clock(seconds, "score"):
            for _, microbatches in updates:
                score_before_updates(run, reference, sampler.masks, microbatches)
        with _clock(seconds, "update"):
            for batch, microbatches in updates:
                result = run.optimiser.step(microbatches, objective(config, run.policy, batch, sampler.masks))
                metrics |= run.total(result.outputs)
                metrics |= {"optim/grad_norm/step": result.grad_norm, "optim/lr/step": result.lr}
        check_exactness(config, step, metrics)
        if grpo.heldout_every_steps and (step % grpo.heldout_every_steps == 0 or step == grpo.num_steps):
            with _clock(seconds, "heldout"):
                metrics |= experience.heldout(fixed)
            experience.keep(step, "heldout")
        metrics["optim/skipped_updates/count"] = run.optimiser.num_skipped
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
        add_logprobs(reference, microbatches, masks, "reference_logprobs")
        if run.config.parallel.reference_offload:
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
        scores = score_microbatch(
            hidden, output_weight, microbatch, masks.allowed, policy, with_entropy=with_entropy
        )
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


def check_exactness(config: RunConfig, step: int, metrics: dict[str, float]) -> None:
    """Stop a run whose sampler and trainer disagree, or whose first update does not start at ratio 1 and KL 0.

    Every number here is an invariant of the method; going on would train on noise (PEERS: the mismatch grows).
    """
    gate, drift = config.grpo.mismatch_kl_gate, metrics.get("rollout/mismatch_kl", 0.0)
    if gate is not None and not drift <= gate:
        raise RuntimeError(
            f"step {step}: KL(rollout || policy) is {drift:.3g} nats a token, above grpo.mismatch_kl_gate={gate}: "
            "sampler and scorer disagree; lower rollout precision, or raise the gate if this drift is known"
        )
    one_update = config.grpo.updates_per_step == 1
    if one_update and abs(metrics.get("grpo/ratio/mean", 1.0) - 1.0) > 1e-5:
        raise AssertionError(f"step {step}: mean ratio of an on-policy update is {metrics['grpo/ratio/mean']}, not 1")
    if step == 1 and one_update and config.precision.params == "fp32":
        divergence = metrics.get("grpo/kl_reference/mean", 0.0)
        if abs(divergence) > 1e-6:
            raise AssertionError(f"first update: KL(policy || reference) is {divergence}, not 0; their weights differ")


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
