"""The FP8 parity gate: do FP8 products still give the log-probabilities of bf16?

The policy's live weights score the same few traces with and without FP8 products. If the mean difference exceeds
`precision.fp8_gate_logprob`, the run either continues in bf16 from there on, even after a resume, or stops. FP8
rollouts have a separate gate, `grpo.mismatch_kl_gate`, which is checked at every step.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from realsr_hpc.behaviour.masks import everything_allowed
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.model.fp8 import stop_fp8, without_fp8
from realsr_hpc.parallel.reduce import broadcast_from_last_stage, reduce_float
from realsr_hpc.train.batches import plain_sequence
from realsr_hpc.train.parts import Parts
from realsr_hpc.train.scoring import logprobs_of

logger = logging.getLogger(__name__)

NUM_IMAGES = 2
"""Number of held-out images whose prompts and true traces are scored; at 7B these are thousands of tokens."""
STOPPED = "fp8_stopped_at_step"
"""Counter in the checkpoint: FP8 was switched off after this step."""


class ParityGate:
    """Compares FP8 with bf16 on a fixed batch and acts on it; every rank comes to the same decision."""

    def __init__(self, parts: Parts, counters: dict[str, int]):
        """counters: the run's, saved with its checkpoints; the gate records there that the run fell back to bf16."""
        self.parts, self.counters, self.precision = parts, counters, parts.config.precision
        batch = LQLoader(parts.config, parts.config.data.heldout_split, NUM_IMAGES, shuffle=False).next()
        rows = zip(parts.tokens.prompts(batch.lq), parts.tokens.responses(batch), strict=True)
        texts = [torch.cat([prompt, torch.tensor(response or [], dtype=prompt.dtype)]) for prompt, response in rows]
        self._microbatches = parts.microbatches([plain_sequence(tokens, 1) for tokens in texts], packing=False)
        policy = parts.policy
        self._allowed = everything_allowed(policy.vocab_size, policy.padded_vocab_size, parts.groups.device)

    def start(self, step: int) -> None:
        """Call before the first step after `step`: stays in bf16 if the run had fallen back, otherwise measures.

        RuntimeError if the difference exceeds the gate and `precision.fp8_gate_action` is "stop".
        """
        if STOPPED in self.counters:
            self._stop_fp8()
            return
        logger.info("FP8 against bf16: %s", self._measure(step))

    def metrics(self, step: int) -> dict[str, float]:
        """The gate's metrics at a step; {} if it is not due."""
        every = self.precision.fp8_gate_every_steps
        if STOPPED in self.counters:
            return {"fp8/on/step": 0.0}
        return self._measure(step) if every and step and step % every == 0 else {}

    def difference(self) -> float:
        """Mean |log-prob(FP8) - log-prob(bf16)| in nats per token, the same on every rank; inf if one is not finite."""
        fp8 = self._logprobs()
        with without_fp8(self.parts.policy):
            bf16 = self._logprobs()
        mean = float((fp8 - bf16).abs().mean()) if self.parts.groups.is_last_stage else 0.0
        # only the last stage has log-probabilities; the maximum over all ranks makes them act alike
        shared = float(broadcast_from_last_stage(mean, self.parts.groups))
        agreed = shared if math.isfinite(shared) else math.inf
        return reduce_float(agreed, torch.distributed.group.WORLD, self.parts.groups.device, "max")

    def _measure(self, step: int) -> dict[str, float]:
        """Measure the difference, act on it and return the gate's metrics. RuntimeError: see `start`."""
        difference, limit = self.difference(), self.precision.fp8_gate_logprob
        metrics = {"fp8/logprob_difference/mean": difference, "fp8/on/step": 1.0}
        if difference <= limit:
            return metrics
        found = f"step {step}: FP8 moves log-probabilities by {difference:.3g} nats per token"
        if self.precision.fp8_gate_action == "stop":
            raise RuntimeError(
                f"{found}, above precision.fp8_gate_logprob={limit}: set precision.fp8=none (or another recipe of "
                "scaling), raise the gate if you expect this difference, or set precision.fp8_gate_action=bf16 to "
                "continue without FP8"
            )
        logger.warning("%s, above precision.fp8_gate_logprob=%s: the run continues in bf16", found, limit)
        self.counters[STOPPED] = step
        self._stop_fp8()
        return metrics | {"fp8/on/step": 0.0}

    def _stop_fp8(self) -> None:
        """Switch FP8 off in the policy and in a frozen reference, so that both keep rounding alike."""
        for policy in self.parts.policies:
            stop_fp8(policy)

    def _logprobs(self) -> Tensor:
        """Log-probabilities of all tokens but the first of each row; empty on all but the last pipeline stage."""
        columns = logprobs_of(self.parts.policy, self._microbatches, self._allowed)
        return torch.cat([column.float() for column in columns if column is not None] or [torch.zeros(0)])
