"""Credit of single tokens: which tokens a reward teaches, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from realsr_hpc.config.reward_options import DegradationOptions
from realsr_hpc.grpo.advantages import group_advantages, place_advantages
from realsr_hpc.records import Candidate, DegradationLabel
from realsr_hpc.rewards.base import FINAL_IMAGE, Reward
from realsr_hpc.rewards.degradation import DegradationReward
from realsr_hpc.train.credit import token_advantages
from realsr_hpc.train.experience import collect
from realsr_hpc.train.grpo import step
from realsr_hpc.train.updates import teaches_nothing
from realsr_hpc.vlcot.sequence import FIELDS
from tests.steps import Images, small_parts

torch.set_num_threads(1)


class ToldPlaces(Reward):
    """A reward whose value the test sets for every code."""

    judges = FINAL_IMAGE

    def __init__(self, places: np.ndarray):
        self.places = places

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        return self.places[[item.member for item in candidates]].mean(1)

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray:
        return self.places[[item.member for item in candidates]]


def judging(parts, judges: tuple[str, ...]):
    """The parts of a run in which the test's reward judges these parts of the trace."""
    parts.rewards.rewards["told"].judges = judges
    return parts


def test_tokens_belong_to_the_part_whose_tag_opened_last():
    parts = small_parts()
    [group, *_] = collect(parts, Images([0]))
    codec, vocabulary = parts.tokens.codec, parts.vocabulary
    tokens = group.rollouts.tokens[0, : group.rollouts.lengths[0]].tolist()
    numbers = codec.parts_of(tokens)
    assert numbers == sorted(numbers) and set(numbers) == set(range(7))
    for number, name in enumerate(FIELDS):
        own = [token for token, part in zip(tokens, numbers, strict=True) if part == number]
        assert own[: len(codec.encode_text(f"<{name}>"))] == codec.encode_text(f"<{name}>")
        codes = sum(vocabulary.id_to_code(token) is not None for token in own)
        assert codes == (group.traces[0].images[number // 2 - 1].size if number in (2, 4, 6) else 0)
    cut = tokens[numbers.index(2) :]  # without the first two parts
    assert codec.parts_of(cut) == numbers[numbers.index(2) :]
    assert codec.parts_of([]) == [] and codec.parts_of(tokens[5:8]) == [-1] * 3


def test_a_reward_teaches_only_the_part_it_judges():
    parts = judging(small_parts(grpo={"credit": "part"}), ("degradation",))
    [group, *_] = collect(parts, Images([0]))
    credit, free = token_advantages(parts, group), ~group.rollouts.forced
    expected = group_advantages(group.rewards.breakdown["told"])
    for row, length in enumerate(group.rollouts.lengths.tolist()):
        numbers = torch.tensor(parts.tokens.codec.parts_of(group.rollouts.tokens[row, :length].tolist()))
        judged = free[row, :length] & (numbers == 0)
        assert 0 < judged.sum() < free[row].sum()
        assert (credit[row, :length][~judged] == 0).all() and (credit[row, length:] == 0).all()
        torch.testing.assert_close(credit[row, :length][judged], expected[row].expand(int(judged.sum())))


def test_a_reward_of_the_whole_trace_teaches_as_without_parts():
    """Bitwise the same update, whether credit is given by rollout or by part."""
    weights = []
    for credit in ("rollout", "part"):
        parts = small_parts(grpo={"credit": credit})
        step(parts, Images([0, 1]), 1)
        weights.append(torch.cat([p.detach().flatten() for p in parts.policy.parameters()]))
    assert torch.equal(*weights)
    narrow = judging(small_parts(grpo={"credit": "part"}), ("degradation",))
    step(narrow, Images([0, 1]), 1)
    assert not torch.equal(weights[0], torch.cat([p.detach().flatten() for p in narrow.policy.parameters()]))


def test_every_code_learns_from_its_own_place():
    """Two of four rollouts differ at one code each; all other advantages are 0. The third has no valid image."""
    parts = judging(small_parts(weight={"weight": 2.0}, grpo={"credit": "part"}), FINAL_IMAGE)
    [group, *_] = collect(parts, Images([0]))
    codes = group.traces[0].images[-1].size
    places = np.zeros((4, codes))
    places[0, 1], places[1, 2], places[2] = 3.0, -3.0, np.nan
    told = ToldPlaces(places)
    parts.rewards.rewards["told"] = told
    parts.rewards.with_places = True
    [group, *_] = collect(parts, Images([0]))
    torch.testing.assert_close(group.rewards.places["told"], torch.tensor(places).float(), equal_nan=True)
    credit = token_advantages(parts, group)
    # three valid rollouts: a value of 3 beside zeros is 2 above their mean, variance 3; so is -3 below; 0 elsewhere
    by_hand = torch.zeros(4, codes)
    divisor = np.sqrt((3.0 + 3.0) / codes)
    by_hand[0, 1], by_hand[[1, 3], 1] = 2 / divisor, -1 / divisor
    by_hand[1, 2], by_hand[[0, 3], 2] = -2 / divisor, 1 / divisor
    for row, length in enumerate(group.rollouts.lengths.tolist()):
        tokens = group.rollouts.tokens[row, :length].tolist()
        at = [i for i, part in enumerate(parts.tokens.codec.parts_of(tokens)) if part == 6]
        at = [i for i in at if parts.vocabulary.id_to_code(tokens[i]) is not None]
        # without places: the rollout's own, as in any group
        expected = 2 * by_hand[row] if row != 2 else group.advantages[row].expand(codes)
        torch.testing.assert_close(credit[row, at], expected, rtol=1e-3, atol=1e-6)
        elsewhere = [i for i in range(length) if i not in at]
        assert (credit[row, elsewhere] == 0).all()


def test_places_are_centred_over_the_group_and_share_one_divisor():
    scores = torch.tensor(np.random.default_rng(0).normal(size=(5, 7)))
    scores[1, 3] = torch.nan
    advantages = place_advantages(scores, epsilon=0.0).numpy()
    known = scores.numpy()
    centred = known - np.nanmean(known, 0)
    np.testing.assert_allclose(advantages, centred / np.sqrt(np.nanvar(known, 0, ddof=1).mean()), equal_nan=True)
    assert np.isnan(advantages[1, 3])


def test_a_group_whose_totals_tie_still_teaches_where_places_differ():
    parts = judging(small_parts(grpo={"credit": "part"}), FINAL_IMAGE)
    [group, *_] = collect(parts, Images([0]))
    codes = group.traces[0].images[-1].size
    same, different, none = np.zeros((4, codes)), np.eye(4, codes), np.full((4, codes), np.nan)
    for places, weight, nothing in ((same, 1, True), (different, 1, False), (different, 0, True), (none, 1, True)):
        rewards = replace(group.rewards, places={"told": torch.tensor(places)}, weights={"told": weight})
        assert teaches_nothing(replace(group, rewards=rewards, advantages=torch.zeros(4))) is nothing


class ToldSlots(DegradationReward):
    """The true phrase is the same for every image."""

    def __init__(self, truth: DegradationLabel):
        super().__init__(DegradationOptions(blur_weight=2.0))
        self.truth = truth

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        return super().compute([replace(item, label=self.truth) for item in candidates])

    def compute_places(self, candidates: Sequence[Candidate]) -> np.ndarray:
        return super().compute_places([replace(item, label=self.truth) for item in candidates])


def test_each_slot_of_the_phrase_learns_whether_its_own_word_is_right():
    parts = small_parts(grpo={"credit": "part"})
    parts.rewards.with_places = True
    parts.rewards.rewards["told"] = ToldSlots(DegradationLabel("medium", "upsample", "heavy", "heavy", "upsample"))
    [group, *_] = collect(parts, Images([0]))
    said = [phrase.split(", ") for phrase in (trace.degradation for trace in group.traces) if phrase]
    true = parts.rewards.rewards["told"].truth.phrase.split(", ")
    weights = np.array([2, 0, 1, 1, 1]) / 5
    right = np.array([[a == b for a, b in zip(words, true, strict=True)] for words in said]) * weights
    assert 0 < (right.std(0) > 0).sum() < 5, "some slots tell rollouts apart, some do not"
    by_hand = (right - right.mean(0)) / np.sqrt(right.var(0, ddof=1).mean())
    credit = token_advantages(parts, group)
    for row, length in enumerate(group.rollouts.lengths.tolist()):
        tokens = group.rollouts.tokens[row, :length].tolist()
        slot = dict(enumerate(parts.tokens.codec.places_of(tokens)))
        phrase = [i for i, part in enumerate(parts.tokens.codec.parts_of(tokens)) if part == 0]
        free = [i for i in phrase if not group.rollouts.forced[row, i]]
        assert [slot[i] for i in free] == [0, 1, 2, 3, 4]
        np.testing.assert_allclose(credit[row, free], by_hand[row], rtol=1e-3, atol=1e-6)
        assert (np.delete(credit[row].numpy(), free) == 0).all()
