"""The objects that a training step uses on this rank. They are built once and passed as arguments."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.lora import adapters_off
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.pipeline import Microbatch, Outputs
from realsr_hpc.parallel.process_groups import ProcessGroups, initialise
from realsr_hpc.parallel.reduce import broadcast_from_last_stage, gather_objects, reduce_float, reduce_floats
from realsr_hpc.records import TrainingGroup, TrainingSequence
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.train.batches import collate, collate_groups
from realsr_hpc.vlcot.grammar import Grammar
from realsr_hpc.vlcot.vocabulary import Vocabulary


@dataclass(frozen=True)
class Parts:
    """Parts of every training loop: process groups, tokenizers, the policy and its optimizer."""

    config: RunConfig
    groups: ProcessGroups
    tokens: TraceTokenizer
    policy: Policy
    optimiser: Optimiser

    @property
    def vocabulary(self) -> Vocabulary:
        """Token ids of the recipe."""
        return self.tokens.codec.vocabulary

    @property
    def policies(self) -> list[Policy]:
        """Every model in memory."""
        return [self.policy]

    def per_rank(self, count: int, field: str) -> int:
        """One data-parallel rank's share of `count`; ValueError if it does not divide evenly."""
        if count % self.groups.dp_size:
            raise ValueError(
                f"{field} is {count}, which {self.groups.dp_size} data-parallel ranks cannot share evenly: "
                f"choose a multiple of {self.groups.dp_size}"
            )
        return count // self.groups.dp_size

    def microbatches(self, sequences: Sequence[TrainingSequence], *, packing: bool) -> list[Microbatch]:
        """Microbatches for this layout; at least one, even without sequences."""
        parallel, pad = self.config.parallel, self.vocabulary.pad
        return collate(sequences, parallel, packing=packing, pad=pad, device=self.groups.device)

    def group_microbatches(self, groups: Sequence[TrainingGroup]) -> list[Microbatch]:
        """Microbatches of rollouts, which share their group's prompt."""
        return collate_groups(groups, self.config.parallel, pad=self.vocabulary.pad, device=self.groups.device)

    def count(self, local: int) -> int:
        """Sum of every data-parallel rank's `local`."""
        return int(reduce_float(float(local), self.groups.dp, self.groups.device, "sum"))

    def total(self, outputs: list[Outputs]) -> dict[str, float]:
        """The last stage's outputs, summed over microbatches and data-parallel ranks; the same on every rank."""
        local: dict[str, float] = {}
        for output in outputs:  # one dictionary of scalars per microbatch
            for name, value in output.items():
                local[name] = local.get(name, 0.0) + float(value)
        # a rank without loss tokens has no outputs, so the names come from all ranks
        named = gather_objects(broadcast_from_last_stage(local, self.groups), self.groups.dp)
        names = sorted({name for part in named for name in part})
        return {name: sum(part.get(name, 0.0) for part in named) for name in names}

    def slowest(self, seconds: dict[str, float]) -> dict[str, float]:
        """The maximum of each measured time over the data-parallel ranks."""
        return reduce_floats(seconds, self.groups.dp, self.groups.device, "max")


@dataclass(frozen=True)
class GRPOParts(Parts):
    """Parts of GRPO: also the frozen reference, the sampler on the live policy, and the rewards."""

    reference: Policy | None
    """None without a KL term; with low-rank adapters the policy itself, which is the reference with them off."""
    sampler: Sampler
    rewards: RewardMixture

    @property
    def policies(self) -> list[Policy]:
        """The trained policy, and the frozen reference where it is a second model."""
        if self.reference is None or self.reference is self.policy:
            return [self.policy]
        return [self.policy, self.reference]

    @contextmanager
    def as_reference(self) -> Iterator[Policy | None]:
        """Context in which the frozen reference is on its device; None without a KL term."""
        if self.reference is self.policy:  # low-rank adapters: one copy of the frozen weights serves both
            with adapters_off(self.policy):
                yield self.policy
            return
        if self.reference is not None:
            self.reference.offload(to_host=False)
        yield self.reference
        if self.reference is not None and self.config.parallel.reference_offload:
            self.reference.offload(to_host=True)


def build_parts(config: RunConfig, num_updates: int) -> Parts:
    """Build the parts from a recipe, on every rank.

    num_updates: optimizer updates of the whole run, at which the learning-rate decay ends.
    """
    groups = initialise(config.parallel, config.seed)
    tokens = TraceTokenizer.load(config, groups.device)
    policy = build_policy(config, groups, tokens.codec.vocabulary.size)
    return Parts(config, groups, tokens, policy, Optimiser(policy, config, num_updates))


def build_grpo_parts(config: RunConfig) -> GRPOParts:
    """Build the parts of GRPO from a recipe, on every rank."""
    parts = build_parts(config, config.grpo.num_steps * config.grpo.updates_per_step)
    return GRPOParts(
        config,
        parts.groups,
        parts.tokens,
        parts.policy,
        parts.optimiser,
        build_reference(config, parts.policy),
        Sampler(parts.policy, Grammar(parts.tokens.codec, config.rollout.grammar), config.rollout, config.seed),
        RewardMixture(
            config.rewards,
            backend.chosen_device("rewards.device", config.rewards.device, parts.groups.device),
            with_places=config.grpo.credit == "part",
        ),
    )


def build_reference(config: RunConfig, policy: Policy) -> Policy | None:
    """The frozen model of the KL term: a second model, or with adapters the policy itself."""
    if config.grpo.kl_beta == 0:
        return None
    if policy.lora is not None:
        return policy
    return build_policy(config, policy.groups, policy.vocab_size, trainable=False)


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the enclosed block to `time/NAME/s`."""
    start = time.perf_counter()
    yield
    key = f"time/{name}/s"
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
