"""Look-ahead changes no token: every width against decoding one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from realsr_hpc.config.schema import ModelConfig, ParallelConfig, RolloutConfig, RunConfig, VLCoTConfig
from realsr_hpc.model.policy import build_policy
from realsr_hpc.parallel.process_groups import initialise
from realsr_hpc.paths import resolve
from realsr_hpc.records import RolloutGroup
from realsr_hpc.rollout import choice
from realsr_hpc.rollout.ahead import Ahead
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.text import TextTokenizer
from realsr_hpc.vlcot.grammar import Grammar
from realsr_hpc.vlcot.sequence import TraceCodec
from realsr_hpc.vlcot.vocabulary import build_vocabulary

CONFIG = RunConfig(
    name="t",
    task="grpo",
    vlcot=VLCoTConfig(instruction="restore <|image|>", max_text_tokens=5),
    model=ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, init_std=0.2),
)
OPTIONS = {
    "plain": dict(grammar="constrained", max_new_tokens=450),
    "cold": dict(grammar="constrained", max_new_tokens=450, temperature=0.1),
    "truncated": dict(
        grammar="constrained", max_new_tokens=300, cfg_scale=0.8, temperature=0.5, text_temperature=1.1,
        image_adaptive_top_k=True, text_top_k=1,
    ),
    "free_text": dict(grammar="modality", max_new_tokens=90, top_p=0.9, temperature=0.7, cfg_scale=1.5),
}  # fmt: skip


@pytest.fixture(scope="module")
def codec():
    text = TextTokenizer(resolve(CONFIG.text_tokenizer.path))
    return TraceCodec(CONFIG.vlcot, build_vocabulary(CONFIG.vlcot, 64, text.vocab_size), text, 16)


@pytest.fixture(scope="module")
def rollouts(codec):
    """(options, seed, **more) -> groups of two prompts x two, and the sampler that made them."""
    torch.set_num_threads(1)
    groups = initialise(ParallelConfig(), 0)
    policy = build_policy(CONFIG, groups, codec.vocabulary.size, trainable=False)

    def run(options: dict, seed: int, graphs: bool = False, **more) -> tuple[list[RolloutGroup], Sampler]:
        config = RolloutConfig(**options, **more)
        used = replace(policy, decode_graphs=graphs)
        sampler = Sampler(used, Grammar(codec, config.grammar), config, seed)
        grids = np.random.default_rng(seed).integers(0, 64, (2, 4, 4))
        prompts = torch.tensor([codec.prompt(grid) for grid in grids])
        return sampler.generate(prompts, 2, [10, 11, 32, 33]), sampler

    return run


def assert_same(ours: list[RolloutGroup], single: list[RolloutGroup]) -> None:
    for one, other in zip(ours, single, strict=True):
        for name in ("tokens", "lengths", "forced", "mask_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        torch.testing.assert_close(one.rollout_logprobs, other.rollout_logprobs, rtol=0, atol=1e-4)
        if other.support is not None:
            free = ~other.forced
            assert torch.equal(one.support[free], other.support[free])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", list(OPTIONS))
def test_every_width_gives_the_tokens_of_decoding_one_by_one(rollouts, options, seed):
    single, sampler = rollouts(OPTIONS[options], seed, lookahead=1)
    assert max(len(group.tokens[0]) for group in single) > 80
    one_by_one = sampler.counts.read()
    assert one_by_one["rollout/tokens_per_pass/mean"] == 1
    for width in (3, 16, 64, "auto"):
        ours, sampler = rollouts(OPTIONS[options], seed, lookahead=width)
        assert_same(ours, single)
        counts = sampler.counts.read()
        if width != "auto":
            assert counts["rollout/passes/count"] < one_by_one["rollout/passes/count"]
            assert 1 < counts["rollout/tokens_per_pass/mean"] <= width


def test_tokens_do_not_depend_on_batches_and_follow_from_seed_and_number(rollouts, monkeypatch):
    """One prompt per pass, or few positions' logits per product, give the same tokens as all together."""
    together, sampler = rollouts(OPTIONS["plain"], 0, lookahead=1)
    finished: list[int] = []
    prompts = torch.stack([group.prompt for group in together])
    monkeypatch.setattr(choice, "DRAWN_AT_ONCE", 3)
    apart = RolloutConfig(**OPTIONS["plain"], lookahead=1, batch_size=2)

    def sampled(seed: int, numbers: list[int]) -> list[RolloutGroup]:
        own = Sampler(sampler.policy, sampler.grammar, apart, seed)
        return own.generate(prompts, 2, numbers, finished.append)

    assert_same(sampled(0, [10, 11, 32, 33]), together)
    assert finished == [2, 4]
    for seed, numbers in ((1, [10, 11, 32, 33]), (0, [12, 13, 34, 35])):
        for one, other in zip(sampled(seed, numbers), together, strict=True):
            columns = slice(min(one.tokens.shape[1], other.tokens.shape[1]))
            assert all((one.tokens[row, columns] != other.tokens[row, columns]).any() for row in range(2))


@pytest.mark.parametrize("width", [1, 7, "auto"])
def test_steps_of_fixed_shapes_look_ahead_alike(rollouts, width):
    options = OPTIONS["truncated"]
    single, _ = rollouts(options, 0, lookahead=1)
    assert_same(rollouts(options, 0, graphs=True, lookahead=width)[0], single)


@pytest.mark.parametrize("options", ["truncated", "free_text"])
def test_drawing_a_rollout_again_in_one_pass_changes_no_token(rollouts, options, monkeypatch):
    groups, sampler = rollouts(OPTIONS[options], 0, lookahead=3)
    monkeypatch.setattr(sampler.policy.config, "params_dtype", torch.bfloat16)  # asks for it; weights stay float32
    prompts = torch.stack([group.prompt for group in groups])
    sampler.generate(prompts, 2, [10, 11, 32, 33])
    assert sampler.counts.redrawn > 40 and sampler.counts.flips == 0
    assert sampler.counts.read()["rollout/lookahead_flips/share"] == 0
    # With another seed's noise most draws differ: the comparison sees it.
    again = Sampler.redraw

    def other_noise(self, decoder, batch, prompts):
        batch.keys += 1
        return again(self, decoder, batch, prompts)

    monkeypatch.setattr(Sampler, "redraw", other_noise)
    sampler.generate(prompts, 2, [10, 11, 32, 33])
    assert 0.3 < sampler.counts.read()["rollout/lookahead_flips/share"] <= 1
    assert "rollout/lookahead_flips/share" not in sampler.counts.read()


def test_each_modality_is_truncated_in_its_own_way(rollouts):
    groups, sampler = rollouts(dict(grammar="constrained", max_new_tokens=200, image_top_k=5, text_top_k=1), 0)
    free = [~group.forced for group in groups]
    image = torch.cat([sampler.masks.image[group.mask_ids[rows]] for group, rows in zip(groups, free, strict=True)])
    assert image.all() and len(image) > 100  # greedy text leaves no choice: it is forced
    kept = torch.cat([group.support[rows] for group, rows in zip(groups, free, strict=True)])
    assert (np.unpackbits(kept.numpy(), axis=-1).sum(-1) == 5).all()


def test_top_p_is_of_the_tempered_distribution(rollouts):
    """The lower the temperature, the fewer codes hold nine tenths of the probability."""
    kept = []
    for temperature in (2.0, 0.2):
        options = dict(grammar="constrained", max_new_tokens=200, text_top_k=1, top_p=0.9, temperature=temperature)
        groups, sampler = rollouts(options, 0)
        chosen = [group.support[sampler.masks.image[group.mask_ids]] for group in groups]
        kept.append(np.unpackbits(torch.cat(chosen).numpy(), axis=-1).sum(-1).mean())
    assert kept[1] < 0.6 * kept[0]


def test_discarded_draws_are_the_next_guesses_and_an_unknown_token_is_guessed_like_the_last(codec):
    ahead, text = Ahead(Grammar(codec, "modality"), 1, 40), codec.vocabulary.text_first
    ahead.accept([0], ahead.window([0], 1), np.array([[text]]))
    window = ahead.window([0], 4)
    assert window.fed.tolist() == [[text] * 4]
    final = ahead.accept([0], window, text + np.array([[0, 1, 2, 3]]))
    assert final.tolist() == [[True, True, False, False]] and ahead.count.tolist() == [3]
    assert (ahead.window([0], 4).fed - text).tolist() == [[1, 2, 3, 3]]


def test_a_code_is_guessed_like_the_one_above_and_a_forced_token_as_itself(codec):
    ahead, vocabulary = Ahead(Grammar(codec, "modality"), 1, 80), codec.vocabulary
    side = codec.side(codec.config.image_sizes_px[0])
    begun = codec.image_block(np.arange(side * side).reshape(side, side))[: 3 + side + 1]  # up to its first newline
    for token in begun:
        ahead.accept([0], ahead.window([0], 1), np.array([[token]]))
    codes = [vocabulary.code_to_id(code) for code in range(side)]
    assert ahead.window([0], side + 2).fed[0].tolist() == [vocabulary.newline, *codes, vocabulary.newline]
