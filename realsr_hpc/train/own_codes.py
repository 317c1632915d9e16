"""Image codes drawn by the policy itself, which supervised fine-tuning reads in place of the true ones.

A policy trained on true traces alone never sees its own mistakes: when it generates an image, each wrong code leads to
further wrong ones (exposure bias). Here some updates read codes that the policy itself draws, while their targets stay
the true codes (scheduled sampling, Bengio et al. 2015). A pass draws all codes of a batch in parallel, each conditioned
on the codes of the previous pass (parallel scheduled sampling, Duckworth et al. 2019). The noise of each position is
fixed, so after n passes the first n codes of a trace are exactly those that autoregressive sampling gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.behaviour.distribution import gathered_logits, sample
from realsr_hpc.behaviour.draws import stream_keys
from realsr_hpc.parallel.pipeline import Microbatch, Outputs, run_pipeline
from realsr_hpc.parallel.reduce import broadcast_from_last_stage
from realsr_hpc.train.parts import Parts

COLDEST = 0.05
"""Lowest temperature that codes are drawn at; the highest is 1."""


def with_own_codes(parts: Parts, microbatches: list[Microbatch], step: int) -> list[Microbatch]:
    """The microbatches of this update; in a share `sft.own_codes` of all updates their inputs hold the policy's codes.

    Which updates, the number of passes (1 to `sft.own_codes_passes`), the temperature (0.05 to 1) and the noise follow
    from the seed and the step.
    """
    sft, seed = parts.config.sft, parts.config.seed
    chance = np.random.default_rng([seed, step])
    if chance.random() >= sft.own_codes:
        return microbatches
    passes, temperature = int(chance.integers(1, sft.own_codes_passes + 1)), float(chance.uniform(COLDEST, 1.0))
    # number of this rank's first noise stream: 2^20 streams per rank and step, so no two microbatches share one
    first = (step * parts.groups.dp_size + parts.groups.dp_rank) << 20
    keys = [keys_of(microbatch, seed, first + number) for number, microbatch in enumerate(microbatches)]
    parts.policy.eval()
    for _ in range(passes):
        microbatches = drawn_once(parts, microbatches, keys, temperature)
    return microbatches


def keys_of(microbatch: Microbatch, seed: int, number: int) -> Tensor:
    """Noise keys of the n loss tokens, one each, int32 [n, 2]."""
    count = 0 if microbatch.loss is None else len(microbatch.loss.targets)
    return torch.from_numpy(stream_keys(seed, number, count)).to(microbatch.tokens.device)


def drawn_once(
    parts: Parts, microbatches: list[Microbatch], keys: Sequence[Tensor], temperature: float
) -> list[Microbatch]:
    """One pass: draw every image code of the responses given the tokens before it; the targets do not change."""
    vocabulary, tp = parts.vocabulary, parts.groups.tp
    columns = slice(vocabulary.image_first, vocabulary.image_end)
    queue = iter(keys)

    def draw(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, Outputs]:
        key, loss = next(queue), microbatch.loss
        if loss is None:
            return hidden.new_zeros(()), {}
        codes = _is_code(loss.targets, columns)
        rows = hidden.flatten(0, 1)[loss.positions[codes]]  # [b, S, H] -> [b x S, H] -> [m codes, H]
        logits = gathered_logits(rows, output_weight, columns, tp)  # [m, image codes]
        allowed = torch.ones(1, logits.shape[-1], dtype=torch.bool, device=logits.device)
        temperatures = torch.full(rows.shape[:1], temperature, device=logits.device)
        tokens, _ = sample(logits, allowed, temperatures, key[codes], first=columns.start)
        return hidden.new_zeros(()), {"codes": tokens}

    # only the last stage draws; the first stage embeds the drawn codes in the next pass, so all stages get them
    outputs = run_pipeline(parts.policy, microbatches, draw, forward_only=True)
    drawn = broadcast_from_last_stage([output.get("codes") for output in outputs], parts.groups)
    return [_reading(m, codes, columns) for m, codes in zip(microbatches, drawn, strict=True)]


def _reading(microbatch: Microbatch, codes: Tensor | None, columns: slice) -> Microbatch:
    """The microbatch with `codes` as its input tokens at the positions of its image codes; targets do not change."""
    if codes is None or microbatch.loss is None:
        return microbatch
    tokens, loss = microbatch.tokens.clone(), microbatch.loss
    places = loss.positions[_is_code(loss.targets, columns)] + 1  # position i predicts token i + 1
    tokens.view(-1)[places] = codes.to(tokens)
    return replace(microbatch, tokens=tokens)


def _is_code(targets: Tensor, columns: slice) -> Tensor:
    return (targets >= columns.start) & (targets < columns.stop)
