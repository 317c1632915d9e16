import numpy as np
import pytest
from pydantic import ValidationError

from realsr_hpc.config.reward_options import DegradationOptions
from realsr_hpc.records import DegradationLabel
from realsr_hpc.rewards.degradation import DegradationReward, read_phrase, slot_matches

from .conftest import LABEL, make_candidate, make_trace


def score(phrase, label=LABEL, **options):
    item = make_candidate(None, make_trace(degradation=phrase), label=label)
    return DegradationReward(DegradationOptions(**({"resize1_weight": 1.0} | options))).score([item])[0]


def test_the_papers_example_is_three_of_five():
    assert score("medium blur, downsample, heavy noise, light compression, upsample") == pytest.approx(0.6)


def test_truth_is_one_and_unknown_truth_or_no_phrase_zero():
    assert [score(LABEL.phrase), score(None), score(LABEL.phrase, label=None)] == [1.0, 0.0, 0.0]


def test_neighbouring_levels_earn_the_ordinal_credit():
    label = DegradationLabel("light", "keep", "light", "light", "keep")
    phrase = "medium blur, keep, heavy noise, light compression, keep"
    assert score(phrase, label, neighbour=0.5) == pytest.approx((0.5 + 1 + 0 + 1 + 1) / 5)


def test_reading_is_lenient_about_order_case_and_filler():
    said = read_phrase("The image: Heavy Noise; light  blur, first downsample then upsample. medium compression")
    assert said == ("light", "downsample", "heavy", "medium", "upsample")


def test_naming_everything_wins_nothing():
    phrase = "light blur medium blur heavy blur, keep upsample downsample, light noise heavy noise"
    assert read_phrase(phrase) == (None, None, None, None, None)


@pytest.mark.parametrize(
    ("phrase", "resizes"),
    [
        ("upsample, light noise", ("upsample", None)),
        ("light blur, keep", ("keep", None)),
        ("light noise, light compression, keep", (None, "keep")),
    ],
)
def test_a_single_resize_word_takes_the_slot_of_its_place(phrase, resizes):
    said = read_phrase(phrase)
    assert (said[1], said[4]) == resizes


def test_slot_matches_names_the_slots():
    phrase = "medium blur, downsample, heavy noise, light compression, upsample"
    np.testing.assert_array_equal(slot_matches(phrase, LABEL), [False, True, False, True, True])


def test_slots_weigh_what_the_recipe_says():
    phrase = "medium blur, keep, heavy noise, light compression, upsample"  # compression and the last resize are right
    assert score(phrase, resize1_weight=0.0) == pytest.approx(2 / 4)
    assert score(phrase, resize1_weight=0.0, compression_weight=3.0) == pytest.approx(4 / 6)
    assert score(phrase, resize2_weight=0.0, compression_weight=0.0) == 0.0
    weights = ("blur_weight", "resize1_weight", "noise_weight", "compression_weight", "resize2_weight")
    with pytest.raises(ValidationError, match="every slot's weight is 0"):
        DegradationOptions(**dict.fromkeys(weights, 0.0))


def test_the_first_resize_cannot_be_seen_and_does_not_count_by_default():
    assert DegradationOptions().slot_weights == (1.0, 0.0, 1.0, 1.0, 1.0)


def test_each_slot_is_scored_by_itself_where_the_phrase_is_written_slot_by_slot():
    reward = DegradationReward(DegradationOptions(compression_weight=3.0))  # 1, 0, 1, 3, 1
    written = "medium blur, downsample, heavy noise, light compression, upsample"
    others = ("light compression, medium blur, downsample, heavy noise, upsample", "heavy noise", None)
    items = [make_candidate(None, make_trace(degradation=phrase), label=LABEL) for phrase in (written, *others)]
    items.append(make_candidate(None, make_trace(degradation=written), label=None))
    places = reward.score_places(items)
    np.testing.assert_allclose(places[0], [0, 0, 0, 3 / 6, 1 / 6])
    assert places[0].sum() == reward.score(items)[0]
    assert np.isnan(places[1:]).all()
