import numpy as np
import pytest
import torch

from realsr_hpc.config.learning import RewardsConfig, RewardTerm
from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.mixture import RewardMixture, build_reward, stacked

from .conftest import make_candidate, make_trace

TEXT_TERMS = {
    "format": RewardTerm(kind="format", weight=2.0),
    "fidelity": RewardTerm(kind="fidelity", weight=0.5),
}


class Breaks(Reward):
    """Raises on some items, returns NaN or infinity on others."""

    range = (-1.0, 1.0)

    def compute(self, candidates):
        if any(item.trace.degradation == "raise" for item in candidates):
            raise RuntimeError("broken on purpose")
        scores = {"nan": np.nan, "inf": np.inf}
        return np.array([scores.get(item.trace.degradation, 9.0) for item in candidates])


def test_rewards_are_the_weighted_sum_of_the_breakdown(photograph):
    mixture = RewardMixture(RewardsConfig(terms=TEXT_TERMS))
    scored = mixture.score([make_candidate(photograph), make_candidate(None, make_trace(faults=("x",)))])
    expected = 2.0 * scored.breakdown["format"] + 0.5 * scored.breakdown["fidelity"]
    torch.testing.assert_close(scored.total, expected)
    assert scored.failures == {"format": 0, "fidelity": 0}


@pytest.mark.parametrize(("gate", "kept"), [(True, False), (False, True)])
def test_gate_gives_malformed_traces_the_minimum_of_image_rewards(photograph, gate, kept):
    mixture = RewardMixture(RewardsConfig(terms=TEXT_TERMS, gate_malformed=gate))
    scored = mixture.score([make_candidate(photograph, make_trace(faults=("x",)))])
    assert (scored.breakdown["fidelity"][0] > 0.5) == kept
    assert scored.breakdown["format"][0] == 0.5  # judges the text as well: it is not gated


class Judges(Reward):
    """Of images, from -1 on; its places break."""

    range = (-1.0, 1.0)
    needs_image = True

    def compute(self, candidates):
        return np.full(len(candidates), 0.5)

    def compute_places(self, candidates):
        raise RuntimeError("broken on purpose")


def test_the_minimum_of_a_gated_reward_is_that_of_its_range_and_broken_places_are_none(photograph):
    mixture = RewardMixture(RewardsConfig(terms=TEXT_TERMS), with_places=True)
    mixture.rewards["fidelity"] = Judges()
    traces = (make_trace(), make_trace(faults=("x",)))
    scored = mixture.score([make_candidate(photograph, trace) for trace in traces])
    assert scored.breakdown["fidelity"].tolist() == [0.5, -1.0] and "fidelity" not in scored.places


def test_many_groups_score_as_each_alone(photograph, other_photograph):
    mixture = RewardMixture(RewardsConfig())
    members = [[make_candidate(photograph), make_candidate(None)], [make_candidate(other_photograph)]]
    together = mixture.score_groups(members)
    for scored, items in zip(together, members, strict=True):
        alone = mixture.score(items)
        for name, values in alone.breakdown.items():
            torch.testing.assert_close(values, scored.breakdown[name], rtol=0, atol=1e-5)


def test_a_broken_item_gets_the_minimum_and_is_counted():
    items = [make_candidate(None, make_trace(degradation=text)) for text in ("fine", "raise", "nan", "inf", "fine")]
    scores, broken = Breaks().score_counted(items)
    np.testing.assert_array_equal(scores, [1.0, -1.0, -1.0, -1.0, 1.0])
    np.testing.assert_array_equal(broken, [False, True, True, True, False])


def test_places_of_malformed_traces_are_unknown_and_parts_without_places_are_filled_up():
    """Of what is read from the image; the phrase of a malformed trace can be scored slot by slot all the same."""
    terms = {"degradation": RewardTerm(kind="degradation"), "fidelity": RewardTerm(kind="fidelity")}
    mixture = RewardMixture(RewardsConfig(terms=terms), with_places=True)
    image = np.zeros((128, 128, 3), np.uint8)
    items = [make_candidate(image), make_candidate(image, make_trace(faults=("x",)))]
    places = mixture.score_batches([items]).places
    assert np.isfinite(places["degradation"]).all()
    assert np.isfinite(places["fidelity"]).all(1).tolist() == [True, False] and np.isnan(places["fidelity"][1]).all()
    joined = stacked([np.ones((2, 3)), None, np.zeros((1, 0))], [2, 2, 1])
    np.testing.assert_array_equal(joined, [[1.0] * 3] * 2 + [[np.nan] * 3] * 3)


def test_every_default_term_is_deterministic_within_its_range(photograph):
    items = [make_candidate(photograph), make_candidate(photograph[:, ::-1].copy()), make_candidate(None)]
    for name, term in RewardsConfig().terms.items():
        reward = build_reward(name, term)
        first, second = reward.score(items), reward.score(items)
        assert first.shape == (3,) and np.array_equal(first, second)
        assert (first >= reward.range[0]).all() and (first <= reward.range[1]).all()
        assert not reward.needs_image or first[2] == reward.range[0]


def test_unknown_options_are_named_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"terms.look.options.*sharpness.*Valid options: expert, weights"):
        build_reward("look", RewardTerm(kind="generation", options={"sharpness": 3}))


def test_a_ramped_weight_depends_on_the_step_alone(photograph):
    ramped = TEXT_TERMS["fidelity"].model_copy(update={"final_weight": 2.5, "ramp_steps": (10, 20)})
    mixture = RewardMixture(RewardsConfig(terms={**TEXT_TERMS, "fidelity": ramped}))
    assert mixture.weights["fidelity"] == 0.5
    for step, weight in ((10, 0.5), (15, 1.5), (20, 2.5), (99, 2.5), (1, 0.5)):
        mixture.at_step(step)
        scored = mixture.score([make_candidate(photograph)])
        assert scored.weights == {"format": 2.0, "fidelity": weight}
        expected = 2.0 * scored.breakdown["format"] + weight * scored.breakdown["fidelity"]
        torch.testing.assert_close(scored.total, expected)


def test_rewards_need_terms():
    with pytest.raises(ValueError, match="empty"):
        RewardMixture(RewardsConfig(terms={}))
