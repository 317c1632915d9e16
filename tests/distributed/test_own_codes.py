"""Codes that the policy draws for supervised training are those that it would sample, in every layout."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import NARROW, with_image_tokenizer

SMALL = ["recipe=sft_tiny", *NARROW, "model.init_std=0.3", "precision.params=fp32", "sft.batch_size=2"]
CODES = 16 + 64 + 144
TEMPERATURE = 0.7


def logits_of(hidden, output_weight, microbatch):
    """As a loss function: logits [b x S, V] of every place."""
    return hidden.new_zeros(()), {"logits": hidden.flatten(0, 1) @ output_weight.T}


def drawn(overrides: list[str], folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens before any and after each of three passes, and what the policy's own logits and noise give for each."""
    import torch

    from realsr_hpc.data.loader import LQLoader
    from realsr_hpc.train.own_codes import drawn_once, keys_of
    from realsr_hpc.train.parts import build_parts
    from realsr_hpc.train.sft import trace_sequences

    torch.set_num_threads(1)
    config = with_image_tokenizer(overrides, folder)
    parts = build_parts(config, 1)
    parts.policy.eval()
    sequences = trace_sequences(parts.tokens, LQLoader(config, config.data.train_split, 2).next())
    batches = parts.microbatches(sequences, packing=config.sft.packing)
    keys = [keys_of(batch, 5, number) for number, batch in enumerate(batches)]
    passes, expected = [batches], []
    for _ in range(3):
        if parts.groups.tp_size * parts.groups.pp_size == 1:
            drawn = [drawn_by_hand(parts, batch, noise) for batch, noise in zip(passes[-1], keys, strict=True)]
            expected.append(torch.cat(drawn).numpy())
        passes.append(drawn_once(parts, passes[-1], keys, TEMPERATURE))
        assert all(a.loss is b.loss for a, b in zip(batches, passes[-1], strict=True))  # targets stay the true codes
    return [torch.cat([batch.tokens for batch in each]).numpy() for each in passes], expected


def drawn_by_hand(parts: Any, batch: Any, noise: Any) -> Any:
    """Tokens [b, S] where each code is the draw after the tokens before it, one place after another."""
    from realsr_hpc.behaviour.draws import gumbel
    from realsr_hpc.parallel.pipeline import run_pipeline

    [output] = run_pipeline(parts.policy, [batch], logits_of, forward_only=True)
    tokens, (first, stop) = batch.tokens.clone(), (parts.vocabulary.image_first, parts.vocabulary.image_end)
    for n, (place, target) in enumerate(zip(batch.loss.positions, batch.loss.targets, strict=True)):
        if first <= target < stop:
            scores = output["logits"][place, first:stop] / TEMPERATURE + gumbel(noise[n : n + 1], first, stop)[0]
            tokens.view(-1)[place + 1] = first + int(scores.argmax())
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own_codes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return run_ranks(1, drawn, SMALL, folder)[0]


def test_a_pass_draws_each_code_after_what_the_pass_before_has_drawn(alone):
    passes, expected = alone
    assert all((a == b).all() for a, b in zip(passes[1:], expected, strict=True))
    changed = [int((a != b).sum()) for a, b in itertools.pairwise(passes)]
    assert changed[0] > 2 * CODES * 0.9 and all(changed)


@pytest.mark.parametrize("change", ["sft.packing=true", "parallel.microbatch_tokens=1024"])
def test_packed_rows_and_several_microbatches(folder, change):
    passes, expected = run_ranks(1, drawn, [*SMALL, change], folder)[0]
    assert all((a == b).all() for a, b in zip(passes[1:], expected, strict=True)) and (passes[0] != passes[1]).any()


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_every_layout_draws_the_same_codes(folder, alone, layout):
    for passes, _ in run_ranks(2, drawn, [*SMALL, f"parallel.{layout}=2", "cluster.tasks_per_node=2"], folder):
        assert all((a == b).all() for a, b in zip(passes, alone[0], strict=True))
