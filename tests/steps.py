"""A GRPO step small enough for a test, all of it real but the rewards, which the test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from realsr_hpc.config.learning import GRPOConfig, RewardsConfig, RewardTerm, RolloutConfig
from realsr_hpc.config.operation import CheckpointConfig
from realsr_hpc.config.schema import (
    ImageTokenizerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    VLCoTConfig,
)
from realsr_hpc.model.policy import build_policy
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.parallel.process_groups import initialise
from realsr_hpc.paths import resolve
from realsr_hpc.records import Candidate, LQBatch
from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.text import TextTokenizer
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.train.parts import GRPOParts, build_reference
from realsr_hpc.vlcot.grammar import Grammar
from realsr_hpc.vlcot.sequence import TraceCodec
from realsr_hpc.vlcot.vocabulary import build_vocabulary

Rule = Callable[[Sequence[Candidate]], Sequence[float]]
"""Rollouts of a batch -> their rewards in [0, 1]; batches are cut and dealt out, so one by one."""
TRACE = {"instruction": "restore <|image|>", "max_text_tokens": 3, "image_sizes_px": (32, 64, 96)}
"""Images of 2 x 2, 4 x 4 and 6 x 6 codes."""
CODES = ImageTokenizerConfig(
    downsample=16,
    codebook_size=64,
    embed_dim=4,
    latent_channels=8,
    base_channels=32,
    channel_multiplier=(1, 1, 1, 1, 1),
    decoder_base_channels=32,
    decoder_channel_multiplier=(1, 1, 1, 1, 1),
    decoder_output_shuffle=1,
)


class Told(Reward):
    """What the rule says."""

    def __init__(self, rule: Rule):
        self.rule = rule

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        return np.array(self.rule(candidates))


class Images:
    """A source of random LQ images that counts its batches; an image's first pixel is its number."""

    def __init__(self, rows: Sequence[int], advance: bool = False):
        """rows: the first batch's images. advance: the next batch has the next images, else the same."""
        self.rows, self.advance, self.batches = list(rows), advance, 0
        self.skipped: dict[str, str] = {}

    def next(self) -> LQBatch:
        index = [row + (self.batches * len(self.rows) if self.advance else 0) for row in self.rows]
        self.batches += 1
        pixels = np.stack([np.random.default_rng(number).integers(0, 255, (3, 32, 32), np.uint8) for number in index])
        pixels[:, 0, 0, 0] = index
        nothing = (None,) * len(index)
        keys = tuple(str(number) for number in index)
        return LQBatch(torch.from_numpy(pixels), None, nothing, nothing, keys, torch.tensor(index))

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"batches": self.batches}


def number_of(candidate: Candidate) -> int:
    """Of the image a rollout restores."""
    return int(candidate.lq[0, 0, 0])


def rising(candidates: Sequence[Candidate]) -> list[float]:
    """Four rewards that differ, for the rollouts of each prompt."""
    return [(0.1, 0.7, 0.3, 0.9)[item.member % 4] for item in candidates]


def small_parts(rule: Rule = rising, weight: dict[str, Any] | None = None, **sections: Any) -> GRPOParts:
    """Parts of a tiny policy with random weights, groups of four and one reward, `told`; sections as keywords.

    weight: fields of the reward's term.
    """
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 48, "init_std": 0.15}
    term = RewardTerm(kind="format", **(weight or {}))
    config = RunConfig(
        name="t",
        task="grpo",
        vlcot=VLCoTConfig(**TRACE | sections.get("vlcot", {})),
        image_tokenizer=CODES,
        model=ModelConfig(**shape | sections.get("model", {})),
        parallel=ParallelConfig(**{"distributed_optimizer": False} | sections.get("parallel", {})),
        precision=PrecisionConfig(**sections.get("precision", {})),
        rollout=RolloutConfig(**{"grammar": "constrained", "max_new_tokens": 200} | sections.get("rollout", {})),
        grpo=GRPOConfig(**{"group_size": 4, "kl_beta": 0.0} | sections.get("grpo", {})),
        optim=OptimConfig(**{"lr": 1e-3} | sections.get("optim", {})),
        rewards=RewardsConfig(terms={"told": term}),
        checkpoint=CheckpointConfig(**sections.get("checkpoint", {})),
        seed=5,
    )
    groups = initialise(config.parallel, seed=0)
    text = TextTokenizer(resolve(config.text_tokenizer.path))
    codec = TraceCodec(config.vlcot, build_vocabulary(config.vlcot, 64, text.vocab_size), text, 16)
    torch.manual_seed(0)
    tokens = TraceTokenizer(codec, ImageTokenizer(CODES).eval().to(groups.device), groups.device)
    size = codec.vocabulary.size
    policy = build_policy(config, groups, size)
    reference = build_reference(config, policy)
    sampler = Sampler(policy, Grammar(codec, config.rollout.grammar), config.rollout, config.seed)
    rewards = RewardMixture(config.rewards)
    rewards.rewards["told"] = Told(rule)
    return GRPOParts(config, groups, tokens, policy, Optimiser(policy, config, 10), reference, sampler, rewards)
