"""Group rollouts: sample responses from the behaviour distribution and keep its log-probabilities.

A pass feeds each row its last token and guesses of the next ones, and keeps the draws whose prefix was right
(ahead.py).

Every rollout draws from its own counter-based stream, keyed by the run's seed and the rollout's global number, so
tokens do not depend on how rollouts are distributed over ranks and batches. The tokens that grammar and truncation
allowed at each position are recorded with the rollout: the loss scores exactly that distribution.

Finished rollouts leave the batch. With pipeline parallelism there are as many batches as stages, and they take turns:
each stage works on one batch while the tokens of the others are in transit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor

from realsr_hpc.behaviour.draws import stream_keys
from realsr_hpc.behaviour.masks import MaskTable
from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.records import RolloutGroup
from realsr_hpc.rollout.ahead import Ahead, Window
from realsr_hpc.rollout.cache import Cache, Place
from realsr_hpc.rollout.choice import Choice, Drawn
from realsr_hpc.rollout.decoder import Decoder
from realsr_hpc.rollout.sampled import SampledTokens
from realsr_hpc.rollout.width import Width
from realsr_hpc.vlcot.automaton import END
from realsr_hpc.vlcot.grammar import Grammar

T = TypeVar("T")
RETIRE_AT = 0.75
"""Finished rows leave the batch once at most this share of its rows is unfinished: leaving copies the cache."""


class Sampler:
    """Samples groups of responses from the live policy."""

    def __init__(self, policy: Policy, grammar: Grammar, config: RolloutConfig, seed: int):
        self.policy, self.grammar, self.config, self.seed = policy, grammar, config, seed
        self.groups = policy.groups
        self.masks = MaskTable(grammar, config, policy.padded_vocab_size, policy.groups.device)
        self.choice = Choice(self.masks, config)
        self.width = Width(config)
        self.counts = Counts()

    def generate(
        self,
        prompts: Int[Tensor, "*shape"],
        group_size: int,
        rollout_ids: Sequence[int],
        progress: Callable[[int], None] = lambda rollouts: None,
    ) -> list[RolloutGroup]:
        """One group per prompt. Prompts are of equal length (one instruction, one LQ size).

        Args:
            prompts: token ids [P, L] of P prompts of L tokens each.
            group_size: rollouts per prompt.
            rollout_ids: global number of every rollout [P * group_size]; with the seed it decides the draws.
            progress: called with the number of rollouts finished so far.

        Raises:
            ValueError: if there is not one id per rollout.
        """
        if len(rollout_ids) != len(prompts) * group_size:
            raise ValueError(f"{len(rollout_ids)} rollout ids for {len(prompts)} prompts x {group_size}: give one each")
        decoder = Decoder(self.policy)
        at_once = max(1, self.config.batch_size // group_size)
        result: list[RolloutGroup] = []
        for start in range(0, len(prompts), at_once):
            stop = min(start + at_once, len(prompts))
            # As many batches as pipeline stages: while one batch is in transit, each stage works on another.
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
        """Decode one batch to its end; yields before every wait for another pipeline stage's result."""
        is_last, batch = self.groups.is_last_stage, self._new_batch(rollout_ids)
        room = self.config.max_new_tokens + self.width.widest
        cache = decoder.new_cache(prompts, group_size, room, self.masks.guided)
        hidden = yield from decoder.prefill(cache, prompts)
        if hidden is not None:
            # the first draw of all rollouts of a prompt: [P, H] -> [1 stream, n = P G rows, 1 token, H]
            hidden = hidden.repeat_interleave(group_size, 0)[None, :, None]
        window, started = batch.ahead.window(batch.rows, 1), backend.work_seconds(self.groups.device)
        while True:
            if not is_last:
                yield
            width = self._accept_draws(decoder, batch, window, hidden, started)
            alive = batch.ahead.alive(batch.rows)
            if not alive.any():
                break
            # copying the cache to drop finished rows pays off only if enough of them are finished
            kept = retire(batch.rows, alive.tolist(), group_size)
            if len(kept) <= RETIRE_AT * len(batch.rows):
                written = int(window.first.max()) + window.fed.shape[1]
                batch.keep_rows(cache, kept, group_size, written)
            if is_last:
                yield
            window, started = batch.ahead.window(batch.rows, width), backend.work_seconds(self.groups.device)
            hidden = yield from decoder.step(cache, *self._fed(window))
        self._share(batch.sampled)
        if self.policy.config.params_dtype != torch.float32 and self.width.widest > 1:
            yield from self.redraw(decoder, batch, prompts)
        batch.sampled.lengths += torch.from_numpy(batch.ahead.count).to(self.groups.device)
        return batch.sampled.groups(prompts, group_size)

    def _new_batch(self, rollout_ids: Sequence[int]) -> Batch:
        limit, device, rows = self.config.max_new_tokens, self.groups.device, len(rollout_ids)
        # [rows, T, 2]: the keys of every position are drawn in advance, so the order of passes does not matter
        keys = np.stack([stream_keys(self.seed, number, limit) for number in rollout_ids])
        sampled = SampledTokens.empty(
            rows, limit, self.grammar.codec.vocabulary.pad, self.masks.allowed.shape[-1], device
        )
        return Batch(Ahead(self.grammar, rows, limit), sampled, torch.from_numpy(keys).to(device), list(range(rows)))

    def _fed(self, window: Window) -> tuple[Tensor, np.ndarray, Tensor | None]:
        """The arguments of `Decoder.step` for a window."""
        fed, starts = (torch.from_numpy(array).to(self.groups.device) for array in (window.fed, window.starts))
        return fed, window.first, starts if self.masks.guided else None

    def redraw(self, decoder: Decoder, batch: Batch, prompts: Int[Tensor, "P L"]) -> Generator[None, None, None]:
        """Draw the first rollout's tokens again, all in one pass, and count those that rounding alone changes.

        A pass of another shape rounds logits differently; in bf16 this flips draws that were near ties.
        """
        count = int(batch.ahead.count[0])
        if count < 2:
            return
        # all tokens but the first, guessed right: one pass of width count - 1 draws the whole rollout again
        window = batch.ahead.replay(0).window([0], count - 1)
        cache = decoder.new_cache(prompts[:1], 1, count, self.masks.guided)
        yield from decoder.prefill(cache, prompts[:1])
        fed, first, starts = self._fed(window)
        place = Place(torch.from_numpy(first).to(fed.device), count - 1, count - 1, starts)
        hidden = yield from decoder.step_at(cache, fed, place)
        if hidden is None:
            return
        mask_ids = self.grammar.automaton.masks[window.states[0]]
        drawn = self.choice(decoder, hidden[:, 0], mask_ids, np.ones(count - 1, dtype=bool), batch.keys[0, 1:count])
        free = ~drawn.forced
        self.counts.redrawn += int(free.sum())
        self.counts.flips += int((drawn.tokens != batch.sampled.tokens[0, 1:count])[free].sum())

    def _accept_draws(
        self, decoder: Decoder, batch: Batch, window: Window, hidden: Tensor | None, started: float
    ) -> int:
        """Draw the tokens after a pass and keep the final ones; returns the width of the next pass."""
        rows, limit, width = np.array(batch.rows), self.config.max_new_tokens, window.fed.shape[1]
        # [n, W] each: the token drawn after each fed one, and its mask
        positions = window.first[:, None] + 1 + np.arange(width)
        mask_ids = self.grammar.automaton.masks[window.states]
        drawn, packed = None, np.zeros(positions.size + 1, dtype=np.int64)  # n W tokens, then the next width
        if hidden is not None:
            where = (rows[:, None], positions.clip(max=limit - 1))
            keys = batch.keys[tuple(torch.from_numpy(index).to(hidden.device) for index in where)].flatten(0, 1)
            choosing = (window.states != END) & (positions < limit)
            # [streams, n, W, H] -> [streams, n W, H]
            drawn = self.choice(decoder, hidden.flatten(1, 2), mask_ids.flatten(), choosing.flatten(), keys)
            packed[:-1] = drawn.tokens.cpu().numpy()
            final = batch.ahead.accept(batch.rows, window, packed[:-1].reshape(positions.shape))
            self._record_pass(batch, final, backend.work_seconds(self.groups.device) - started)
            packed[-1] = self._next_width(batch)
        if self.groups.pp_size > 1:
            sent = torch.from_numpy(packed).to(self.groups.device)
            dist.broadcast(sent, _last_stage(self.groups), group=self.groups.pp)
            packed = sent.cpu().numpy()
        if hidden is None:
            final = batch.ahead.accept(batch.rows, window, packed[:-1].reshape(positions.shape))
        self.counts.add(final)
        batch.write(final, positions, packed[:-1], mask_ids, drawn)
        return int(packed[-1])

    def _record_pass(self, batch: Batch, final: Bool[np.ndarray, "n W"], seconds: float) -> None:
        """Tell the width's chooser how many draws the pass kept per unfinished row, and how long it took."""
        if batch.situation is not None:
            accepted = float(final.sum() / max(1, final.any(1).sum()))
            self.width.record(*batch.situation, final.shape[1], accepted, seconds)

    def _next_width(self, batch: Batch) -> int:
        """The width of the next pass; tensor-parallel rank 0 decides for all, because the ranks measure other times."""
        masks = self.grammar.automaton.masks[batch.ahead.state[batch.rows]]
        batch.situation = (len(batch.rows), self.choice.in_images(masks))
        width, groups = self.width.choose(*batch.situation), self.groups
        if self.width.fixed is None and groups.tp_size > 1:
            shared = torch.tensor([width], device=groups.device)
            dist.broadcast(shared, dist.get_global_rank(groups.tp, 0), group=groups.tp)
            width = int(shared)
        return width

    def _share(self, sampled: SampledTokens) -> None:
        """Send log-probabilities and flags from the last pipeline stage to all.

        Supports stay on the last stage, which alone scores tokens.
        """
        if self.groups.pp_size > 1:
            for column in (sampled.logprobs, sampled.forced):
                dist.broadcast(column, _last_stage(self.groups), group=self.groups.pp)


@dataclass
class Counts:
    """Statistics of decoding since they were last read."""

    passes: int = 0
    row_passes: int = 0
    """Number of unfinished rows, summed over passes."""
    tokens: int = 0
    redrawn: int = 0
    """Tokens drawn again in a pass of another shape, see `Sampler.redraw`."""
    flips: int = 0
    """Number of redrawn tokens that differed from the first draw."""

    def add(self, final: Bool[np.ndarray, "n W"]) -> None:
        """Count a pass that kept these draws."""
        self.passes += 1
        self.row_passes += int(final.any(1).sum())
        self.tokens += int(final.sum())

    def read(self) -> dict[str, float]:
        """This rank's metrics since the last call; resets the counts."""
        metrics = {"rollout/lookahead_flips/share": self.flips / self.redrawn} if self.redrawn else {}
        metrics |= {
            "rollout/passes/count": float(self.passes),
            "rollout/tokens_per_pass/mean": self.tokens / max(1, self.row_passes),
        }
        self.passes = self.row_passes = self.tokens = self.redrawn = self.flips = 0
        return metrics


@dataclass
class Batch:
    """Rollouts that are decoded together."""

    ahead: Ahead
    sampled: SampledTokens
    keys: Int[Tensor, "all T 2"]
    rows: list[int]
    """The rows that are still in the batch."""
    situation: tuple[int, bool] | None = None
    """Number of rows, and whether most are in images, for which the last width was chosen; see width.py."""

    def keep_rows(self, cache: Cache, kept: list[int], group_size: int, written: int) -> None:
        """Continue with only the `kept` ones of the current rows; `written` cache positions are in use."""
        prompt_of = [row // group_size for row in self.rows]
        left, present = sorted({prompt_of[slot] for slot in kept}), sorted(set(prompt_of))
        cache.keep(kept, [present.index(prompt) for prompt in left], written)
        self.rows = [self.rows[slot] for slot in kept]

    def write(
        self,
        final: Bool[np.ndarray, "n W"],
        positions: Int[np.ndarray, "n W"],
        tokens: Int[np.ndarray, " nW"],
        mask_ids: Int[np.ndarray, "n W"],
        drawn: Drawn | None,
    ) -> None:
        """Write the final draws of a pass to `sampled`."""
        device, width = self.keys.device, final.shape[1]
        # slots number the draws of a pass row by row: slot = (row within the batch) x W + offset
        rows, kept = np.array(self.rows), np.flatnonzero(final)
        columns = (rows[kept // width], positions.flatten()[kept], tokens[kept], mask_ids.flatten()[kept], kept)
        row, place, token, mask, slot = (torch.from_numpy(column).to(device) for column in columns)
        known = (None, None) if drawn is None else (drawn.logprobs[slot], drawn.forced[slot])
        self.sampled.write(row, place, token, known[0], mask, known[1])
        for slots, support, first in [] if drawn is None else drawn.supports:
            where = slots.cpu().numpy()
            is_final = final.flatten()[where]
            where = where[is_final]
            places = (torch.from_numpy(rows[where // width]), torch.from_numpy(positions.flatten()[where]))
            self.sampled.write_support(*places, support[torch.from_numpy(is_final).to(device)], first)


def retire(rows: Sequence[int], alive: Sequence[bool], group_size: int) -> list[int]:
    """Which of the current rows stay in the batch, as indices into `rows`.

    Groups stay equally large, so that one product computes the attention of a group to its prefix: each prompt with an
    unfinished row keeps as many rows as the prompt with most unfinished rows, finished rows serving as padding.
    """
    by_prompt: dict[int, list[int]] = {}
    for slot, row in enumerate(rows):
        by_prompt.setdefault(row // group_size, []).append(slot)
    groups = [sorted(slots, key=lambda slot: not alive[slot]) for slots in by_prompt.values()]
    width = max(sum(alive[slot] for slot in slots) for slots in groups)
    return [slot for slots in groups if alive[slots[0]] for slot in sorted(slots[:width])]


def _in_turns(batches: list[Generator[None, None, T]]) -> list[T]:
    """Run all generators in turns, each up to its next yield; returns their results in order.

    Every pipeline stage takes the turns in the same order, so that sends, receives and broadcasts match.
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


def _last_stage(groups) -> int:
    return dist.get_global_rank(groups.pp, groups.pp_size - 1)
