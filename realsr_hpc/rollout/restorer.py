"""Restore images with a policy: prompts, one or several sampled traces each, decoded images."""

from __future__ import annotations

from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.records import LQBatch, RestoredImage
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.vlcot.grammar import Grammar

FIRST_ID = 1 << 40
"""Rollout numbers from here on are no training rollout's: restoring never shares draws with training."""


class PolicyRestorer:
    """Calls a policy on batches of LQ images; the same images and seed give the same result."""

    def __init__(self, policy: Policy, tokens: TraceTokenizer, config: RunConfig, *, constrained: bool = True):
        """constrained: force a well-formed trace, whatever grammar the recipe trains with."""
        self.tokens = tokens
        grammar = Grammar(tokens.codec, "constrained" if constrained else config.rollout.grammar)
        self.sampler = Sampler(policy, grammar, sampling(config), config.seed)

    def __call__(self, batch: LQBatch) -> list[RestoredImage]:
        """One restored image each."""
        return [candidates[0] for candidates in self.candidates(batch, 1)]

    def candidates(self, batch: LQBatch, count: int) -> list[list[RestoredImage]]:
        """`count` restored images each; their prompt is read once."""
        ids = [FIRST_ID + int(index) * count + member for index in batch.index for member in range(count)]
        self.sampler.policy.eval()
        groups = self.sampler.generate(self.tokens.prompts(batch.lq), count, ids)
        traces = [trace for group in groups for trace in self.tokens.codec.parse_group(group)]
        stages = zip(
            *(self.tokens.decode([trace.images[stage] for trace in traces]) for stage in range(3)), strict=True
        )
        restored = [RestoredImage(images[2], trace, images) for trace, images in zip(traces, stages, strict=True)]
        return [restored[start : start + count] for start in range(0, len(restored), count)]


def sampling(config: RunConfig) -> RolloutConfig:
    """The recipe's rollouts with what its section `restore` changes."""
    chosen = config.restore
    cfg_scale = config.rollout.cfg_scale if chosen.cfg_scale is None else chosen.cfg_scale
    return config.rollout.model_copy(
        update={**chosen.model_dump(), "image_adaptive_top_k": False, "cfg_scale": cfg_scale}
    )
