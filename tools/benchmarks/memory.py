"""The planner's memory against what small runs on the CPU really allocate, term by term.

    python tools/bench.py memory [section.field=value ...]

Each variant builds policy and optimizer, decodes the first and the last token of its rollouts, scores and makes an
update, with the loop's own functions and sequences of the planned length (of random tokens). Counted is every
allocation of PyTorch's allocator, temporary ones too, so a peak is exact. A GPU's context, workspaces and
fragmentation are no part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.config.derived import pass_tokens
from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import MIB
from realsr_hpc.model.lora import adapters_off
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch
from realsr_hpc.parallel.process_groups import ProcessGroups, initialise
from realsr_hpc.plan.memory import GIB, Memory, kv_cache_bytes, memory
from realsr_hpc.plan.sizes import (
    guided,
    has_reference,
    microbatch_shape,
    sequence_tokens,
    sequences_of_a_rank,
    truncated,
)
from realsr_hpc.records import GRPOBatch, LossTokens, RolloutTokens, TrainingGroup, TrainingSequence
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.cache import Cache
from realsr_hpc.rollout.decoder import Decoder
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.train.batches import collate, collate_groups
from realsr_hpc.train.objective import objective
from realsr_hpc.train.scoring import logprobs_of, with_columns
from realsr_hpc.train.sft_loss import cross_entropy
from realsr_hpc.vlcot.grammar import Grammar
from tools.benchmarks._allocations import Allocations
from tools.benchmarks._measure import show
from tools.benchmarks.rewards import some_candidates

SMALL = [
    "cluster=local",
    "cluster.tasks_per_node=1",
    "model.weights=null",
    "model.num_layers=2",
    "model.hidden_size=256",
    "model.ffn_hidden_size=640",
    "vlcot.image_sizes_px=[32,64,96]",
    "vlcot.lq_size_px=64",
    "rollout.max_new_tokens=534",
]
GRPO = ["recipe=grpo_tiny", *SMALL, "grpo.prompts_per_step=2", "grpo.group_size=4", "parallel.microbatch_tokens=3072"]
SFT = ["recipe=sft_tiny", *SMALL, "sft.batch_size=6", "parallel.microbatch_tokens=3072"]
BF16 = "precision.params=bf16"
GUIDED = ["rollout.cfg_scale=0.8", "rollout.image_adaptive_top_k=true", "rollout.text_top_k=1"]
LORA = ["model.lora={rank: 16, alpha: 32}"]
VARIANTS: dict[str, list[str]] = {
    "GRPO, float32": GRPO,
    "GRPO, bf16": [*GRPO, BF16],
    "GRPO, MLPs recomputed": [*GRPO, "parallel.recompute=selective"],
    "GRPO, all recomputed, bf16": [*GRPO, BF16, "parallel.recompute=full"],
    "GRPO, guided, adaptive top-k": [*GRPO, *GUIDED, "grpo.kl_beta=0"],
    "GRPO, guided, all recomputed": [*GRPO, *GUIDED, "grpo.kl_beta=0", "parallel.recompute=full"],
    "GRPO, LoRA, bf16": [*GRPO, BF16, *LORA],
    "GRPO, LoRA, all recomputed, bf16": [*GRPO, BF16, *LORA, "parallel.recompute=full"],
    "GRPO, LoRA, guided, bf16": [*GRPO, BF16, *LORA, *GUIDED],
    "SFT, LoRA, bf16": [*SFT, BF16, *LORA, "sft.packing=false", "parallel.recompute=full"],
    "SFT": SFT,
    "SFT, all recomputed": [*SFT, "parallel.recompute=full"],
}


@dataclass(frozen=True)
class Term:
    """Bytes of one part of a run."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """1: exact; above: the plan asks for more than is used."""
        return self.planned / self.measured


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments."""
    torch.set_num_threads(1)
    rows = []
    for name, overrides in VARIANTS.items():
        try:
            config = compose_one([*overrides, *arguments])
        except RecipeError as error:
            print(error, file=sys.stderr)
            return 2
        for term, seen in compare(config).items():
            rows.append(
                [name, term, f"{seen.planned / MIB:.1f}", f"{seen.measured / MIB:.1f}", f"{seen.ratio - 1:+.1%}"]
            )
            name = ""
    show("memory of small runs, MiB", ["", "term", "planned", "measured", "planned is off by"], rows)
    return 0


def compare(config: RunConfig) -> dict[str, Term]:
    """Every term that a run on the CPU can show; with several processes each calls it, and sees its own stage."""
    plan, run, parallel = memory(config, microbatch_shape(config)), _Run(config), config.parallel
    scored = has_reference(config)
    scoring = run.score() if scored else 0.0  # the loss needs its result
    terms = {
        "weights": Term((plan.resident["weights"] + plan.resident.get("adapters", 0.0)) * GIB, run.weights),
        "gradients": Term(plan.resident["gradients (fp32)"] * GIB, run.gradients),
        "optimizer": Term(plan.resident["optimizer"] * GIB, run.optimizer()),
        "peak of images": Term(_phase(plan, "images"), run.images()),
    }
    if parallel.pp == 1:
        kept = sum(plan.phases["update"].get(name, 0.0) for name in ("activations", "attention masks")) * GIB
        terms["activations of a microbatch"] = Term(kept, run.activations())
    terms["peak of an update"] = Term(_phase(plan, "update"), run.update())
    if config.task == "grpo" and parallel.pp == 1:
        cache, peak = run.rollout()
        terms["KV cache"] = Term(kv_cache_bytes(config), cache)
        terms["peak of rollouts"] = Term(_phase(plan, "rollout"), peak)
    if config.task == "grpo":
        networks, peak = run.rewards()
        terms["rewards' networks"] = Term(plan.resident["rewards' networks"] * GIB, networks)
        terms["peak of rewards"] = Term(_phase(plan, "rewards"), peak)
    if scored:
        terms["peak of scoring"] = Term(_phase(plan, "score"), scoring)
    return terms


def _phase(plan: Memory, name: str) -> float:
    return sum(plan.phases[name].values()) * GIB


class _Run:
    """One recipe's parts, and what each allocated."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.groups: ProcessGroups = initialise(config.parallel, config.seed)
        self.tokens = TraceTokenizer.load(config, self.groups.device)
        self.codec = self.tokens.codec
        self.policy: Policy = build_policy(config, self.groups, self.codec.vocabulary.size)
        self.optimiser = Optimiser(self.policy, config, total_steps=10)
        parameters: list[Any] = list(self.policy.parameters())
        self.weights = _sizes(parameters)
        self.gradients = _sizes([parameter.main_grad for parameter in parameters if parameter.requires_grad])
        self.sampler = Sampler(self.policy, Grammar(self.codec, config.rollout.grammar), config.rollout, config.seed)
        with Allocations() as seen:
            self.microbatches = self._collated()
        self._collated_bytes = seen.rise

    def _collated(self) -> list[Microbatch]:
        count, grpo = sequences_of_a_rank(self.config), self.config.task == "grpo"
        size = self.config.grpo.group_size if grpo else 1
        self.training = tuple(self._group(size) for _ in range(count // size))
        parallel, pad, device = self.config.parallel, self.codec.vocabulary.pad, self.groups.device
        if grpo:
            return collate_groups(self.training, parallel, pad=pad, device=device)
        sequences = [sequence for group in self.training for sequence in group.sequences]
        return collate(sequences, parallel, packing=self.config.sft.packing, pad=pad, device=device)

    def _group(self, size: int) -> TrainingGroup:
        """Random tokens that the grammar's widest mask allows, at the planned length; the whole response is learnt."""
        allowed = self.sampler.masks.allowed
        mask = int(allowed.sum(1).argmax()) if self.config.task == "grpo" else 0
        choices = allowed[mask].nonzero()[:, 0]
        prompt, response = (choices[torch.randint(0, len(choices), (n,))] for n in sequence_tokens(self.config))
        members = (self._sequence(prompt, response[torch.randperm(len(response))], mask) for _ in range(size))
        return TrainingGroup(len(prompt), tuple(members))

    def _sequence(self, prompt_ids: Tensor, response_ids: Tensor, mask: int) -> TrainingSequence:
        prompt, response, allowed = len(prompt_ids), len(response_ids), self.sampler.masks.allowed
        has_support, has_twin = truncated(self.config), guided(self.config)
        tokens, places = torch.cat([prompt_ids, response_ids]), torch.arange(response)
        loss = LossTokens(
            positions=prompt - 1 + places,
            targets=response_ids,
            mask_ids=torch.full((response,), mask),
            temperature=torch.ones(response),
            support=torch.full((response, -(-allowed.shape[1] // 8)), 255, dtype=torch.uint8) if has_support else None,
            cfg_scale=torch.ones(response) if has_twin else None,
            rollouts=RolloutTokens(
                torch.zeros_like(places), places, torch.ones(1), rollout_logprobs=torch.full((response,), -5.0)
            ),
        )
        return TrainingSequence(tokens, loss, torch.arange(prompt + response) // 50 if has_twin else None)

    def _objective(self) -> LossFunction:
        sequences = [sequence for group in self.training for sequence in group.sequences]
        tokens = sum(len(sequence.loss.positions) for sequence in sequences)
        if self.config.task == "sft":
            return cross_entropy(self.policy, self.codec.vocabulary, tokens, self.config.sft)
        batch = GRPOBatch(self.training, tokens, len(sequences))
        return objective(self.config, self.policy, batch, self.sampler.masks)

    def optimizer(self) -> float:
        """Main weights and moments after an update, each storage once and none of the model's own."""
        result = self.optimiser.step(self.microbatches[:1], self._objective())
        assert result.applied, "the measured update was not applied"
        known = {parameter.untyped_storage().data_ptr() for parameter in self.policy.parameters()}
        held: dict[int, int] = {}
        for vendor in getattr(self.optimiser.vendor, "chained_optimizers", [self.optimiser.vendor]):
            states = [value for state in vendor.optimizer.state.values() for value in state.values()]
            for value in [*states, *vendor.get_parameters()]:
                storage = value.untyped_storage()
                if storage.data_ptr() not in known:
                    held[storage.data_ptr()] = storage.nbytes()
        return float(sum(held.values()))

    def activations(self) -> float:
        """What a forward pass of one microbatch leaves for its backward pass, the hidden states included."""
        first, chunk = self.microbatches[0], self.policy.train().chunks[0]
        return _least(lambda: chunk(first.tokens, first.segment_ids, first.branches, first.image_blocks)).rise

    def update(self) -> float:
        """Peak of forward and backward over all microbatches."""
        seen = _least(lambda: self.optimiser.backward(self.microbatches, self._objective(), []))
        return self._collated_bytes + seen.peak

    def score(self) -> float:
        """Peak of the reference's log-probabilities, once the buffers that stay are there."""
        allowed, at_once = self.sampler.masks.allowed, self.config.parallel.scoring_microbatches

        def score() -> list[Tensor | None]:
            with adapters_off(self.policy):
                return logprobs_of(self.policy, self.microbatches, allowed, at_once=at_once)

        pairs = zip(self.microbatches, score(), strict=True)
        peak = self._collated_bytes + _least(score).peak
        self.microbatches = [with_columns(microbatch, reference_logprobs=values) for microbatch, values in pairs]
        return peak

    def images(self) -> float:
        """Peak of encoding what a step encodes, and of decoding what it decodes."""
        count, sizes = sequences_of_a_rank(self.config), self.config.vlcot
        is_grpo, final = self.config.task == "grpo", sizes.image_sizes_px[-1]
        encoded = count // self.config.grpo.group_size if is_grpo else count
        images = torch.zeros(encoded, 3, final, final, dtype=torch.uint8)
        with Allocations() as encoding:
            self.tokens.encode(images, sizes.lq_size_px if is_grpo else final)
        side = self.codec.side(final)
        with Allocations() as decoding:
            self.tokens.decode([np.zeros((side, side), int)] * self.config.rewards.batch_size if is_grpo else [])
        return max(encoding.peak, decoding.peak)

    def rewards(self) -> tuple[float, float]:
        """The networks that score, and the peak of scoring one batch of final images."""
        settings = self.config.rewards
        with Allocations() as built:
            mixture = RewardMixture(settings)
        batch = some_candidates(settings.batch_size, self.config.vlcot.image_sizes_px[-1])
        return built.rise, _least(lambda: mixture.score_batches([batch])).peak

    @torch.no_grad()
    def rollout(self) -> tuple[float, float]:
        """The cache after the prompts, and the peak of the first and the last token."""
        grpo_config, rollout = self.config.grpo, self.config.rollout
        decoder = Decoder(self.policy.eval())
        at_once = min(max(1, rollout.batch_size // grpo_config.group_size), grpo_config.prompts_per_step)
        prompts = torch.randint(0, self.codec.vocabulary.size, (at_once, sequence_tokens(self.config)[0]))
        last, rows = rollout.max_new_tokens - 1, at_once * grpo_config.group_size
        room, is_guided = rollout.max_new_tokens + self.sampler.width.widest, self.sampler.masks.guided

        def prefill() -> Cache:
            cache = decoder.new_cache(prompts, grpo_config.group_size, room, is_guided)
            _end(decoder.prefill(cache, prompts))
            return cache

        def draw() -> None:
            hidden = _end(decoder.step(cache, fed, first, starts))
            self._draw(decoder, hidden.flatten(1, 2))

        prefilled, cache = _least(prefill), prefill()
        for stream in cache.streams:  # as if all tokens but the last were decoded
            stream.keys.zero_()
            stream.values.zero_()
        width = pass_tokens(rollout, rows) // rows
        fed, first = prompts.new_zeros(rows, width), np.full(rows, last)
        starts = torch.zeros_like(fed) if is_guided else None
        kept = sum(_sizes([stream.keys, stream.values]) for stream in cache.streams)
        kept += sum(_sizes(pair) for pair in cache.streams[0].prefix)
        return kept, max(prefilled.peak, kept + _least(draw).peak)

    def _draw(self, decoder: Decoder, hidden: Tensor) -> None:
        """An image code behind each hidden state [streams, m, H], then a text token, as the sampler draws them."""
        count, masks = hidden.shape[1], self.sampler.masks
        choices = masks.allowed.sum(1)
        keys, everywhere = torch.zeros(count, 2, dtype=torch.int32), np.ones(count, dtype=bool)
        for kind in (masks.image, ~masks.image):
            mask = int(choices.masked_fill(~kind, 0).argmax())
            self.sampler.choice(decoder, hidden, np.full(count, mask), everywhere, keys)


def _least(work: Callable[[], object]) -> Allocations:
    """What the work allocates, the least of three: gloo releases what it sent a moment after its last use."""
    measured = []
    for _ in range(3):
        with Allocations() as seen:
            result = work()
        del result
        measured.append(seen)
    return min(measured, key=lambda seen: seen.peak)


def _sizes(tensors: Sequence[Tensor]) -> float:
    """Bytes that the tensors name; several may share a buffer."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _end(turns: Generator[None, None, Tensor | None]) -> Tensor:
    """The result of a pass in turns, on one stage."""
    try:
        while True:
            next(turns)
    except StopIteration as end:
        return end.value
