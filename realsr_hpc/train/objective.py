"""GRPO's loss as the pipeline calls it, and the checks on the first update of a step."""

from __future__ import annotations

from torch import Tensor

from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.grpo.loss import GlobalCounts, mismatch, policy_loss
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch, Outputs
from realsr_hpc.records import GRPOBatch, RolloutTokens
from realsr_hpc.train.scoring import nothing_to_score, score_tokens


def objective(config: RunConfig, policy: Policy, batch: GRPOBatch, masks: MaskTable) -> LossFunction:
    """Loss function of one update: a microbatch's part of the policy loss, and its metrics.

    See `LossFunction` for its arguments and results. Metrics are divided by the global counts, so their sums are means.
    """
    counts = GlobalCounts(batch.num_tokens_global, batch.num_rollouts_global, config.rollout.max_new_tokens)
    with_entropy = config.grpo.entropy_weight != 0.0

    def loss_fn(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, Outputs]:
        loss = microbatch.loss
        if loss is None or loss.rollouts is None:
            return nothing_to_score(hidden, output_weight), {}
        scores = score_tokens(hidden, output_weight, loss, masks.allowed, policy, with_entropy=with_entropy)
        # from here on [N rollouts, longest]: the n loss tokens, one row per rollout, padded where `mask` is False
        rollouts, mask = loss.rollouts, loss.rollouts.mask
        logprobs, sampled = rollouts.rows(scores.logprobs), rollouts.rows(rollouts.rollout_logprobs)
        old, per_token = _rows(rollouts, rollouts.old_logprobs), _rows(rollouts, rollouts.token_advantages)
        terms = policy_loss(
            logprobs,
            sampled,
            rollouts.advantages if per_token is None else per_token,
            mask,
            _rows(rollouts, rollouts.reference_logprobs),
            counts=counts,
            config=config.grpo,
            old_logprobs=old,
            entropy=rollouts.rows(scores.entropy) if with_entropy else None,
        )
        drift = mismatch(sampled, logprobs if old is None else old, mask)
        sums = {"rollout/mismatch_kl": drift.kl_sum, "rollout/mismatch_abs": drift.abs_sum}
        return terms.loss, terms.metrics | {name: value / counts.num_tokens for name, value in sums.items()}

    return loss_fn


def _rows(rollouts: RolloutTokens, values: Tensor | None) -> Tensor | None:
    return None if values is None else rollouts.rows(values)


class InexactStep(RuntimeError):
    """Raised if sampler, policy and reference disagree where their log-probabilities must be equal."""

    def __init__(self, message: str, *, gate: bool = False) -> None:
        """gate: whether they differ by more than grpo.mismatch_kl_gate allows."""
        super().__init__(message)
        self.gate = gate


def check_exactness(config: RunConfig, step: int, first: dict[str, float]) -> None:
    """Stop a run if sampler and trainer disagree, or if the first update does not start at ratio 1 (in step 1 at KL 0).

    `first` holds the metrics of the step's first update. These numbers are invariants of the method: if one is
    violated, further training would learn from noise. Raises InexactStep.
    """
    gate, drift = config.grpo.mismatch_kl_gate, first["rollout/mismatch_kl"]
    if gate is not None and not drift <= gate:
        raise InexactStep(
            f"step {step}: KL(rollout || policy) is {drift:.3g} nats per token, above grpo.mismatch_kl_gate={gate}: "
            "sampler and scorer disagree; lower rollout precision, or raise the gate if you expect this drift",
            gate=True,
        )
    ratio = first["grpo/ratio/mean"]
    if not abs(ratio - 1.0) <= 1e-5:
        raise InexactStep(f"step {step}: the mean ratio of its first update is {ratio}, not 1: the policy changed")
    if step == 1 and config.grpo.kl_beta and not abs(first["grpo/kl_reference/mean"]) <= rounding(config):
        divergence = first["grpo/kl_reference/mean"]
        raise InexactStep(f"first update: KL(policy || reference) is {divergence}, not 0; their weights differ")


def rounding(config: RunConfig) -> float:
    """KL in nats per token that rounding alone can cause between two scorings with the same weights."""
    if config.precision.fp8 != "none":
        return 1e-2  # the reference's scales come from other batches
    return {"fp32": 1e-5, "bf16": 1e-3}[config.precision.params]
