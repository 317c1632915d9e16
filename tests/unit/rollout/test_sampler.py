"""Finished rollouts leave the batch, and the other rollouts do not change."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.config.schema import ModelConfig, RunConfig, VLCoTConfig
from realsr_hpc.model.policy import build_policy
from realsr_hpc.parallel.process_groups import initialise
from realsr_hpc.paths import resolve
from realsr_hpc.rollout import sampler as room
from realsr_hpc.rollout.decoder import Cache
from realsr_hpc.rollout.sampler import Sampler, retire
from realsr_hpc.tokenizer.text import TextTokenizer
from realsr_hpc.vlcot.automaton import END, Automaton
from realsr_hpc.vlcot.grammar import Grammar
from realsr_hpc.vlcot.sequence import TraceCodec
from realsr_hpc.vlcot.vocabulary import build_vocabulary

CONFIG = RunConfig(
    name="t",
    task="grpo",
    vlcot=VLCoTConfig(instruction="restore <|image|>"),
    model=ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, init_std=0.2),
    rollout=RolloutConfig(max_new_tokens=120, cfg_scale=0.7, temperature=1.3, image_top_k=40),
)


def test_tokens_a_pass_are_of_rows_that_still_had_some_to_come():
    counts = room.Counts()
    counts.add(np.array([[True, True, False], [True, False, False], [False] * 3]))
    counts.add(np.array([[True], [False], [False]]))
    assert counts.read() == {"rollout/passes/count": 2.0, "rollout/tokens_per_pass/mean": 4 / 3}
    assert counts.read() == {"rollout/passes/count": 0.0, "rollout/tokens_per_pass/mean": 0.0}


def test_groups_stay_equally_large_and_finished_prompts_leave():
    rows = list(range(12))  # three prompts of four
    alive = [row in (1, 3, 8) for row in rows]
    assert retire(rows, alive, 4) == [1, 3, 8, 9]
    assert retire([4, 6, 8, 9], [False, True, False, False], 4) == [1]
    assert retire(rows, [True] * 12, 4) == rows


def test_a_prompt_that_stays_is_counted_among_those_still_present():
    """Prompt 1 of three left the batch earlier; now prompt 0 leaves it."""
    asked: list[tuple[list[int], list[int], int]] = []
    cache: Any = SimpleNamespace(keep=lambda *given: asked.append(given))
    nothing: Any = None
    batch = room.Batch(nothing, nothing, torch.zeros(0), [0, 1, 2, 3, 8, 9, 10, 11])
    batch.keep_rows(cache, [4, 6], 4, 30)
    assert asked == [([4, 6], [1], 30)] and batch.rows == [8, 10]


class EndingGrammar(Grammar):
    """Cuts rollout number i of twelve off after 9 (1 + 5 i mod 12) tokens, so that lengths differ widely."""

    def __init__(self, codec: TraceCodec):
        super().__init__(codec, "constrained")
        inner, longest = self.automaton, 9 * 12
        size = len(inner.masks)
        left = np.arange(longest + 1)[:, None]
        # State s with r tokens to come is number r size + s; none to come, or the inner end: END.
        default, targets = (
            np.where((left > 1) & (after != END), (left - 1) * size + after, END)
            for after in (inner.default, inner.targets)
        )
        branches = left * size * inner.vocabulary_size + inner.branches
        masks, copies = (np.tile(column, longest + 1) for column in (inner.masks, inner.copies))
        self.automaton = Automaton(
            masks, copies, default.flatten(), branches.flatten(), targets.flatten(), inner.vocabulary_size
        )
        self.start = 9 * (1 + np.arange(12) * 5 % 12) * size + self.start


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    torch.set_num_threads(1)
    text = TextTokenizer(resolve(CONFIG.text_tokenizer.path))
    codec = TraceCodec(CONFIG.vlcot, build_vocabulary(CONFIG.vlcot, 64, text.vocab_size), text, 16)
    policy = build_policy(CONFIG, initialise(CONFIG.parallel, 0), codec.vocabulary.size, trainable=False)
    return Sampler(policy, EndingGrammar(codec), CONFIG.rollout, seed=2)


def test_rows_are_in_images_if_more_than_half_of_them_choose_a_code(sampler):
    image = int(sampler.masks.image.int().argmax())
    text = int(sampler.masks.image.int().argmin())
    found = [sampler.choice.in_images(np.array(ids)) for ids in ([image, image, text], [image, text], [text])]
    assert found == [True, False, False]


@pytest.mark.parametrize("graphs", [False, True], ids=["", "steps of fixed shapes"])
def test_leaving_changes_no_rollout(sampler, monkeypatch, graphs):
    sampler = Sampler(replace(sampler.policy, decode_graphs=graphs), sampler.grammar, CONFIG.rollout, seed=2)
    grids = np.random.default_rng(0).integers(0, 64, (3, 4, 4))
    prompts = torch.tensor([sampler.grammar.codec.prompt(grid) for grid in grids])
    left: list[int] = []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, rows, *rest: left.append(len(rows)) or keep(self, rows, *rest))
    shrinking = sampler.generate(prompts, 4, list(range(12)))
    assert len(left) >= 2 and left[-1] < 6
    monkeypatch.setattr(room, "RETIRE_AT", -1.0)
    padded = sampler.generate(prompts, 4, list(range(12)))
    for ours, whole in zip(shrinking, padded, strict=True):
        assert torch.equal(ours.tokens, whole.tokens) and torch.equal(ours.lengths, whole.lengths)
        assert torch.equal(ours.forced, whole.forced)
        behind = torch.arange(ours.tokens.shape[1]) >= ours.lengths[:, None]
        assert behind.any() and (ours.tokens[behind] == sampler.grammar.codec.vocabulary.pad).all()
        assert ours.forced[behind].all() and (ours.rollout_logprobs[behind] == 0).all()
        torch.testing.assert_close(ours.rollout_logprobs, whole.rollout_logprobs, rtol=0, atol=1e-5)
        free = ~whole.forced
        assert torch.equal(ours.support[free], whole.support[free])
