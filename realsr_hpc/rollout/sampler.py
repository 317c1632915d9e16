"""Group rollouts: sample responses token by token from the behaviour distribution and keep its log-probabilities.

Every rollout draws from its own counter-based stream, keyed by the run's seed and the rollout's global number. So the
tokens do not depend on how rollouts are spread over ranks and batches. What the grammar and truncation allowed at each
position is kept with the tokens: the loss scores with exactly that distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from realsr_hpc.behaviour.distribution import Truncation, guided, modality_support, pack_support, sample
from realsr_hpc.config.schema import RolloutConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.records import RolloutGroup
from realsr_hpc.rollout.decoder import Decoder, Stream
from realsr_hpc.vlcot.grammar import Grammar


class MaskTable:
    """A grammar's masks on the device, with what depends on the mask alone; sampler and scorer read the same one."""

    def __init__(self, grammar: Grammar, config: RolloutConfig, policy: Policy):
        device = policy.groups.device
        padding = policy.padded_vocab_size - grammar.codec.vocabulary.size
        self.allowed = F.pad(torch.from_numpy(grammar.mask_table), (0, padding)).to(device)
        """bool [masks, padded vocabulary]."""
        self.forced = torch.from_numpy(grammar.forced).to(device)
        self.image = torch.from_numpy(grammar.image_rows).to(device)
        text = config.temperature if config.text_temperature is None else config.text_temperature
        self.temperature = torch.where(self.image, config.temperature, text)
        self.cfg_scale = torch.where(self.image, config.cfg_scale, 1.0)


@dataclass
class _Record:
    """Columns of one batch, one entry a step."""

    tokens: list[Tensor]
    logprobs: list[Tensor]
    mask_ids: list[Tensor]
    forced: list[Tensor]
    support: list[Tensor]


class Sampler:
    """Samples groups of responses from the live policy."""

    def __init__(self, policy: Policy, grammar: Grammar, config: RolloutConfig, seed: int):
        self.policy, self.grammar, self.config, self.seed = policy, grammar, config, seed
        self.groups = policy.groups
        self.masks = MaskTable(grammar, config, policy)
        self.image_truncation = Truncation(config.image_top_k, config.top_p, config.image_adaptive_top_k)
        self.text_truncation = Truncation(config.text_top_k, config.top_p)
        self.guided = config.cfg_scale != 1.0

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
        step = max(1, self.config.batch_size // group_size)
        result: list[RolloutGroup] = []
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step].to(self.groups.device)
            ids = rollout_ids[start * group_size : (start + len(part)) * group_size]
            result += self._batch(decoder, part, group_size, ids)
            progress(len(result) * group_size)
        return result

    def _batch(
        self, decoder: Decoder, prompts: Tensor, group_size: int, rollout_ids: Sequence[int]
    ) -> list[RolloutGroup]:
        config, vocabulary = self.config, self.grammar.codec.vocabulary
        rows = len(rollout_ids)
        draws = np.stack([_stream(self.seed, number, config.max_new_tokens) for number in rollout_ids])
        uniform = torch.from_numpy(draws).to(self.groups.device)
        walks = [self.grammar.walk() for _ in range(rows)]
        next_masks: list[int | None] = [next(walk) for walk in walks]
        record = _Record([], [], [], [], [])
        lengths = np.zeros(rows, dtype=np.int64)
        streams, first = decoder.prefill(prompts, group_size, config.max_new_tokens, self.guided)
        logits = None if first is None else [first.repeat_interleave(group_size, 0)]
        for position in range(config.max_new_tokens):
            alive = [mask is not None for mask in next_masks]
            tokens = self._choose(record, logits, next_masks, uniform[:, position])
            lengths += alive
            for row, token in enumerate(tokens.tolist()):
                if next_masks[row] is not None:
                    next_masks[row] = _advance(walks[row], token)
            if position + 1 == config.max_new_tokens or not any(mask is not None for mask in next_masks):
                break
            self._move_starts(streams, tokens, position)
            logits = decoder.step(streams, tokens, position)
        self._share(record)
        return self._groups(record, prompts, group_size, torch.from_numpy(lengths), vocabulary.pad)

    def _choose(
        self, record: _Record, logits: list[Tensor] | None, next_masks: list[int | None], uniform: Tensor
    ) -> Int[Tensor, " n"]:
        """Sample on the last pipeline stage, tell the others; finished rows get padding."""
        device, masks = self.groups.device, self.masks
        mask_ids = torch.tensor([mask or 0 for mask in next_masks], device=device)
        done = torch.tensor([mask is None for mask in next_masks], device=device)
        if logits is None:
            tokens, logprobs, support = torch.zeros_like(mask_ids), torch.zeros(len(mask_ids), device=device), None
        else:
            merged = logits[0] if len(logits) == 1 else guided(*logits, masks.cfg_scale[mask_ids])
            allowed, temperature, image = masks.allowed[mask_ids], masks.temperature[mask_ids], masks.image[mask_ids]
            support = modality_support(
                merged,
                allowed,
                image,
                image=self.image_truncation,
                text=self.text_truncation,
                temperature=temperature,
            )
            tokens, logprobs = sample(merged, allowed, temperature, support, uniform=uniform)
        if self.groups.pp_size > 1:
            dist.broadcast(tokens, _last_stage(self.groups), group=self.groups.pp)
        tokens = tokens.masked_fill(done, self.grammar.codec.vocabulary.pad)
        record.tokens.append(tokens)
        forced = done | masks.forced[mask_ids]
        if support is not None:
            forced |= support.sum(-1) == 1  # truncation left no choice either (greedy text): no loss, not counted
            record.support.append(pack_support(support))
        record.logprobs.append(logprobs.masked_fill(forced, 0.0))
        record.mask_ids.append(mask_ids)
        record.forced.append(forced)
        return tokens

    def _move_starts(self, streams: list[Stream], tokens: Tensor, position: int) -> None:
        """The unconditional stream sees the current image block alone: anything else starts it anew."""
        if not self.guided or streams[1].starts is None:
            return
        inside = in_image_block(tokens, self.grammar)
        streams[1].starts = torch.where(inside, streams[1].starts, torch.full_like(tokens, position))

    def _share(self, record: _Record) -> None:
        """Give every pipeline stage what only the last one knows."""
        if self.groups.pp_size == 1:
            return
        truncates = self.image_truncation.active or self.text_truncation.active
        if truncates and not record.support:
            width = -(-self.masks.allowed.shape[1] // 8)
            record.support = [tokens.new_zeros(len(tokens), width, dtype=torch.uint8) for tokens in record.tokens]
        for column in (*record.logprobs, *record.forced, *record.support):
            dist.broadcast(column, _last_stage(self.groups), group=self.groups.pp)

    def _groups(
        self, record: _Record, prompts: Tensor, group_size: int, lengths: Tensor, pad: int
    ) -> list[RolloutGroup]:
        stacked = (record.tokens, record.logprobs, record.mask_ids, record.forced)
        columns = [torch.stack(column, 1).cpu() for column in stacked]
        support = torch.stack(record.support, 1).cpu() if record.support else None
        groups = []
        for index, prompt in enumerate(prompts.cpu()):
            rows = slice(index * group_size, (index + 1) * group_size)
            last = int(lengths[rows].max())
            tokens, logprobs, mask_ids, forced = (column[rows, :last] for column in columns)
            padding = torch.arange(last) >= lengths[rows, None]
            groups.append(
                RolloutGroup(
                    prompt=prompt,
                    tokens=tokens,
                    lengths=lengths[rows],
                    rollout_logprobs=logprobs.float(),
                    forced=forced | padding,
                    mask_ids=mask_ids,
                    support=None if support is None else support[rows, :last],
                )
            )
        return groups


def in_image_block(tokens: Int[Tensor, "*shape"], grammar: Grammar) -> Tensor:
    """bool like `tokens`: continues an image block (a size, code, newline or end token).

    Sampler and scorer cut the unconditional stream's context with this same rule.
    """
    vocabulary = grammar.codec.vocabulary
    continues = torch.zeros(vocabulary.size, dtype=torch.bool, device=tokens.device)
    sizes = [vocabulary.size_token(size) for size in grammar.codec.config.image_sizes_px]
    codes = [vocabulary.code_to_id(code) for code in range(vocabulary.num_codes)]
    continues[[*sizes, *codes, vocabulary.newline, vocabulary.image_end]] = True
    return continues[tokens]


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
