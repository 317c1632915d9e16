import numpy as np
import pytest

from realsr_hpc.config.reward_options import FormatOptions
from realsr_hpc.rewards.format import FormatReward

from .conftest import make_candidate, make_trace

GOOD = make_trace()


def scores(*traces, **options):
    return FormatReward(FormatOptions(**options)).score([make_candidate(None, trace) for trace in traces])


def test_well_formed_is_one_and_parts_earn_their_share():
    no_final = make_trace(images=(*GOOD.images[:2], None), faults=("final_image holds no complete image",))
    nothing = make_trace(degradation=None, texts=(None,) * 3, images=(None,) * 3, faults=("no end of turn",))
    np.testing.assert_allclose(scores(GOOD, no_final, nothing), [1.0, 0.5 * 6 / 7, 0.0])


def test_all_parts_but_something_beside_them_is_not_one():
    assert scores(make_trace(faults=("text beside the tags",)))[0] == 0.5


def test_paper_profile_is_one_or_nothing():
    broken = make_trace(images=(*GOOD.images[:2], None), faults=("x",))
    np.testing.assert_array_equal(scores(GOOD, broken, partial=0.0), [1.0, 0.0])


@pytest.mark.parametrize("text", ["lion " * 20, "!!!", " ".join(f"word{i}" for i in range(200))])
def test_repetition_emptiness_and_length_break_a_text(text):
    assert scores(make_trace(texts=(text, "fine", "fine")))[0] == pytest.approx(0.5 * 6 / 7)


@pytest.mark.parametrize(
    ("words", "passes"),
    [("a b c d a b c d a b", True), ("a b c a b c a b c a", False), ("a " * 7, True), ("a b " * 4, False)],
)
def test_a_text_of_eight_words_or_more_needs_two_fifths_of_them_distinct(words, passes):
    """Four of ten are 0.4, three are not; shorter texts may repeat themselves."""
    assert (scores(make_trace(texts=(words, "fine", "fine")))[0] == 1.0) == passes


@pytest.mark.parametrize(("words", "passes"), [("a", False), ("a b", True), ("a b c", True), ("a b c d", False)])
def test_both_ends_of_the_length_are_allowed(words, passes):
    trace = make_trace(texts=(words, "two words", "two words"))
    assert (scores(trace, min_words=2, max_words=3)[0] == 1.0) == passes
