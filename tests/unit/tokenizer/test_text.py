"""Text tokenizer: every text is decoded unchanged, and no ids raise an error."""

import pytest

from realsr_hpc.tokenizer.text import TextTokenizer, train_text_tokenizer

TEXTS = ["a brown cat with green eyes", "a brown dog with long ears"] * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    """280 tokens, two of them whole tags."""
    path = tmp_path_factory.mktemp("text") / "text_tokenizer.json"
    return train_text_tokenizer(TEXTS, 280, path, ["<rough_image>", "</rough_image>"])


@pytest.mark.parametrize("text", ["a brown cat", "żółw 猫 \U0001f408\n\t  x", "<rough_image></rough_image>!", ""])
def test_any_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    """Also words, scripts and white space that were not in its training text."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_trained_words_and_tags_are_short(tokenizer: TextTokenizer) -> None:
    """A known word is one token; a tag is one token and does not merge with the adjacent text."""
    assert len(tokenizer.encode(" brown")) == 1
    tag = tokenizer.encode("<rough_image>")
    assert len(tag) == 1
    assert tokenizer.encode("<rough_image>a brown") == tag + tokenizer.encode("a brown")


def test_ids_fill_the_vocabulary_and_nothing_raises(tokenizer: TextTokenizer) -> None:
    """Ids count from 0; those out of range are ignored; broken UTF-8 decodes to something."""
    assert tokenizer.vocab_size == 280
    assert isinstance(tokenizer.decode(list(range(-10, 400))), str)
    assert tokenizer.decode([-1, 280, 10**9]) == ""
    for token in range(280):
        assert tokenizer.decode([token]) != ""


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path) -> None:
    """The message says how many are needed."""
    with pytest.raises(ValueError, match="at least 258"):
        train_text_tokenizer(TEXTS, 257, tmp_path / "t.json", ["<a>", "<b>"])


def test_a_missing_file_is_named(tmp_path) -> None:
    """The message names the recipe that makes one."""
    with pytest.raises(ValueError, match="text_tokenizer.path.*tokenizer_tiny"):
        TextTokenizer(tmp_path / "none.json")
