"""Group rollouts: sample responses token by token from the behaviour distribution and keep its log-probabilities.

Every rollout draws from its own counter-based stream, keyed by the run's seed and the rollout's global number. So the
tokens do not depend on how rollouts are spread over ranks and batches. What the grammar and truncation allowed at each
position is kept with the tokens: the loss scores with exactly that distribution.

Finished rollouts leave the batch. With several pipeline stages as many batches take turns, so that each stage works on
one while the others' tokens travel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from realsr_hpc.behaviour.distribution import Truncation, guided, modality_support, sample
from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.records import RolloutGroup
from realsr_hpc.rollout.decoder import Cache, Decoder
from realsr_hpc.rollout.record import Record
from realsr_hpc.vlcot.grammar import Grammar

T = TypeVar("T")
RETIRE_AT = 0.75
"""Finished rows leave the batch once no more than this share of its rows has to go on: leaving copies the cache."""


class Sampler:
    """Samples groups of responses from the live policy."""

    def __init__(self, policy: Policy, grammar: Grammar, config: RolloutConfig, seed: int):
        self.policy, self.grammar, self.config, self.seed = policy, grammar, config, seed
        self.groups = policy.groups
        self.masks = MaskTable(grammar, config, policy.padded_vocab_size, policy.groups.device)
        self.image_truncation = Truncation(config.image_top_k, config.top_p, config.image_adaptive_top_k)
        self.text_truncation = Truncation(config.text_top_k, config.top_p)

    def generate(
        self,
        prompts: Int[Tensor, "*shape"],
        group_size: int,
        rollout_ids: Sequence[int],
        progress: Callable[[int], None] = lambda rollouts: None,
    ) -> list[RolloutGroup]:
        """One group a prompt. Prompts are of equal length (one instruction, one LQ size).

        Args:
            prompts: token ids.
            group_size: rollouts a prompt.
            rollout_ids: global number of every rollout [P * group_size]; with the seed it decides the draws.
            progress: told the number of rollouts finished so far.
        """
        if len(rollout_ids) != len(prompts) * group_size:
            raise ValueError(f"{len(rollout_ids)} rollout ids for {len(prompts)} prompts x {group_size}: give one each")
        decoder = Decoder(self.policy)
        at_once = max(1, self.config.batch_size // group_size)
        result: list[RolloutGroup] = []
        for start in range(0, len(prompts), at_once):
            stop = min(start + at_once, len(prompts))
            # As many batches as pipeline stages, in turns: each stage has one to work on.
            bounds = np.linspace(start, stop, min(self.groups.pp_size, stop - start) + 1).astype(int).tolist()
            batches = []
            for first, last in itertools.pairwise(bounds):
                ids = rollout_ids[first * group_size : last * group_size]
                batches.append(self._batch(decoder, prompts[first:last].to(self.groups.device), group_size, ids))
            result += itertools.chain(*_in_turns(batches))
            decoder.finish()
            progress(len(result) * group_size)
        return result

    def _batch(
        self, decoder: Decoder, prompts: Tensor, group_size: int, rollout_ids: Sequence[int]
    ) -> Generator[None, None, list[RolloutGroup]]:
        """Decode one batch to its end, yielding before what needs another pipeline stage's result."""
        limit, is_last = self.config.max_new_tokens, self.groups.is_last_stage
        draws = np.stack([_stream(self.seed, number, limit) for number in rollout_ids])
        uniform = torch.from_numpy(draws).to(self.groups.device)
        walks = [self.grammar.walk() for _ in rollout_ids]
        next_masks: list[int | None] = [next(walk) for walk in walks]
        record = Record.empty(len(rollout_ids), limit, self.grammar.codec.vocabulary.pad, self.groups.device)
        rows = list(range(len(rollout_ids)))
        cache = decoder.new_cache(prompts, group_size, limit, self.masks.guided)
        first = yield from decoder.prefill(cache, prompts)
        logits = None if first is None else first.repeat_interleave(group_size, 0)[None]
        for position in range(limit):
            if not is_last:
                yield
            tokens = self._choose(record, rows, position, logits, next_masks, uniform)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if next_masks[row] is not None:
                    next_masks[row] = _advance(walks[row], token)
            if position + 1 == limit or all(mask is None for mask in next_masks):
                break
            self._move_starts(cache, tokens, position)
            kept = retire(rows, [next_masks[row] is not None for row in rows], group_size)
            if len(kept) <= RETIRE_AT * len(rows):
                prompt_of = [row // group_size for row in rows]
                prompts_left = sorted({prompt_of[slot] for slot in kept})
                present = sorted(set(prompt_of))
                cache.keep(kept, [present.index(prompt) for prompt in prompts_left], position)
                rows, tokens = [rows[slot] for slot in kept], tokens[kept]
            if is_last:
                yield
            logits = yield from decoder.step(cache, tokens, position)
        self._share(record)
        return record.groups(prompts, group_size)

    def _choose(
        self,
        record: Record,
        rows: list[int],
        position: int,
        logits: Float[Tensor, "streams n V"] | None,
        next_masks: list[int | None],
        uniform: Float[Tensor, "all T"],
    ) -> Int[Tensor, " n"]:
        """Sample on the last pipeline stage, tell the others; finished rows get padding."""
        device, masks = self.groups.device, self.masks
        here = torch.tensor(rows, device=device)
        mask_ids = torch.tensor([next_masks[row] or 0 for row in rows], device=device)
        done = torch.tensor([next_masks[row] is None for row in rows], device=device)
        if logits is None:
            tokens, logprobs, support = torch.zeros_like(mask_ids), torch.zeros(len(rows), device=device), None
        else:
            merged = logits[0] if len(logits) == 1 else guided(logits[0], logits[1], masks.cfg_scale[mask_ids])
            allowed, temperature, image = masks.allowed[mask_ids], masks.temperature[mask_ids], masks.image[mask_ids]
            support = modality_support(
                merged,
                allowed,
                image,
                image=self.image_truncation,
                text=self.text_truncation,
                temperature=temperature,
            )
            tokens, logprobs = sample(merged, allowed, temperature, support, uniform=uniform[here, position])
        if self.groups.pp_size > 1:
            dist.broadcast(tokens, _last_stage(self.groups), group=self.groups.pp)
        tokens = tokens.masked_fill(done, self.grammar.codec.vocabulary.pad)
        forced = done | masks.forced[mask_ids]
        if support is not None:
            forced |= support.sum(-1) == 1  # truncation left no choice either (greedy text): no loss, not counted
        record.write(here, position, tokens, logprobs.masked_fill(forced, 0.0), mask_ids, forced, ~done, support)
        return tokens

    def _move_starts(self, cache: Cache, tokens: Tensor, position: int) -> None:
        """The unconditional stream sees the current image block alone: anything else starts it anew."""
        if not self.masks.guided:
            return
        unconditional = cache.streams[1]
        assert unconditional.starts is not None, "the unconditional stream has no starts"
        inside = self.masks.continues_block[tokens]
        unconditional.starts.masked_fill_(~inside, position)  # in place: a step of fixed shapes reads this memory

    def _share(self, record: Record) -> None:
        """Give every pipeline stage what only the last one knows; the supports stay with it, who alone scores."""
        if self.groups.pp_size > 1:
            for column in (record.logprobs, record.forced):
                dist.broadcast(column, _last_stage(self.groups), group=self.groups.pp)


def retire(rows: Sequence[int], alive: Sequence[bool], group_size: int) -> list[int]:
    """Which of the present rows to go on with, as indices into `rows`, when the rest is finished.

    Groups stay equally large, so that a prompt's queries meet its prefix in one product: each prompt that has a row
    alive keeps as many rows as the fullest one has alive, finished ones as padding.
    """
    by_prompt: dict[int, list[int]] = {}
    for slot, row in enumerate(rows):
        by_prompt.setdefault(row // group_size, []).append(slot)
    groups = [sorted(slots, key=lambda slot: not alive[slot]) for slots in by_prompt.values()]
    width = max(sum(alive[slot] for slot in slots) for slots in groups)
    return [slot for slots in groups if alive[slots[0]] for slot in sorted(slots[:width])]


def _in_turns(batches: list[Generator[None, None, T]]) -> list[T]:
    """Run all generators side by side, each up to its next yield in turn; their results in order.

    Every pipeline stage takes the turns in the same order, so sends, receives and broadcasts meet.
    """
    results: dict[int, T] = {}
    while len(results) < len(batches):
        for number, batch in enumerate(batches):
            if number in results:
                continue
            try:
                next(batch)
            except StopIteration as end:
                results[number] = end.value
    return [results[number] for number in range(len(batches))]


def _advance(walk, token: int) -> int | None:
    """Next mask id; None when the response is complete."""
    try:
        return walk.send(token)
    except StopIteration:
        return None


def _stream(seed: int, rollout_id: int, length: int) -> Float[np.ndarray, " length"]:
    """Uniform draws of one rollout, float64 in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=[seed, rollout_id])).random(length)


def _last_stage(groups) -> int:
    return dist.get_global_rank(groups.pp, groups.pp_size - 1)
