"""One fault at a time in an otherwise valid trace: each is named, and the parts that it damages are not read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from realsr_hpc.config.schema import VLCoTConfig
from realsr_hpc.tokenizer.text import train_text_tokenizer
from realsr_hpc.vlcot.grammar import degradation_phrases
from realsr_hpc.vlcot.sequence import FIELDS, Trace, TraceCodec
from realsr_hpc.vlcot.vocabulary import build_vocabulary

Change = Callable[[TraceCodec, list[int], int], None]
"""Spoils the first image block, which begins at a place of the tokens."""


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    texts = [f"<{name}></{name}>" for name in FIELDS] + degradation_phrases()
    text = train_text_tokenizer(texts, 400, tmp_path_factory.mktemp("text") / "tokenizer.json")
    config = VLCoTConfig(instruction="restore <|image|> now")
    return TraceCodec(config, build_vocabulary(config, 64, text.vocab_size), text, 8)


@pytest.fixture(scope="module")
def trace(codec) -> Trace:
    rng = np.random.default_rng(0)
    grids = tuple(rng.integers(0, 64, (codec.side(size),) * 2) for size in codec.config.image_sizes_px)
    return Trace(degradation_phrases()[0], ("a cat", "a cat, asleep", "a cat on a mat"), grids)


def other_size(codec, tokens, start):
    tokens[start + 2] = codec.vocabulary.size_token(64)


def unnamed_size(codec, tokens, start):
    tokens[start + 1] = tokens[start + 2] = codec.vocabulary.size_token(32) - 1  # declares 0 px


def code_for_newline(codec, tokens, start):
    tokens[start + 3 + 4] = codec.vocabulary.code_to_id(0)


def newline_for_code(codec, tokens, start):
    tokens[start + 3] = codec.vocabulary.newline


def no_end(codec, tokens, start):
    del tokens[start + 3 + 4 * 5]


def newline_for_end(codec, tokens, start):
    tokens[start + 3 + 4 * 5] = codec.vocabulary.newline


def a_row_more(codec, tokens, start):
    tokens[start + 3 : start + 3] = tokens[start + 3 : start + 3 + 5]


def a_row_less(codec, tokens, start):
    del tokens[start + 3 : start + 3 + 5]


CHANGES = (
    other_size,
    unnamed_size,
    code_for_newline,
    newline_for_code,
    no_end,
    newline_for_end,
    a_row_more,
    a_row_less,
)


@pytest.mark.parametrize("change", CHANGES)
def test_an_image_block_with_one_wrong_token_is_no_image(codec, trace, change: Change):
    tokens = codec.build(trace)
    start = tokens.index(codec.vocabulary.image_begin)
    assert codec.parse(tokens).well_formed
    change(codec, tokens, start)
    parsed = codec.parse(tokens)
    assert not parsed.well_formed and parsed.images[0] is None
    assert np.array_equal(parsed.images[1], trace.images[1]) and parsed.texts == trace.texts


@pytest.mark.parametrize("text", ["", "   ", "a <b> cat"])
def test_a_text_that_is_empty_or_holds_a_bracket_is_none(codec, trace, text):
    parsed = codec.parse(codec.build(Trace(trace.degradation, (text, *trace.texts[1:]), trace.images)))
    assert parsed.faults == ("rough_understand is empty or holds more than text",)
    assert parsed.texts == (None, *trace.texts[1:])


def test_no_text_imitates_an_image(codec, trace):
    """While tags are searched, an image is a number between private-use characters, which a model may also write."""
    tokens = codec.build(trace)
    tag, closing = codec.encode_text("<rough_image>"), codec.encode_text("</rough_image>")
    start, end = tokens.index(codec.vocabulary.image_begin), tokens.index(codec.vocabulary.image_end)
    assert tokens[start - len(tag) : start] == tag and tokens[end + 1 : end + 1 + len(closing)] == closing
    written = [*tokens[:start], *codec.encode_text("\ue0000\ue001"), *tokens[end + 1 :]]
    parsed = codec.parse(written)
    assert parsed.images[0] is None and "rough_image holds no complete image" in parsed.faults


def test_only_ids_of_the_tokenizer_are_text_and_only_size_tokens_declare_pixels(codec):
    vocabulary = codec.vocabulary
    first, behind = vocabulary.text_first, vocabulary.text_first + vocabulary.num_text
    assert all(map(vocabulary.is_text, (first, behind - 1)))
    assert not any(map(vocabulary.is_text, (first - 1, behind)))
    sizes = [vocabulary.size_px(vocabulary.size_token(32) + step) for step in (-1, 0, 1, 126, 127)]
    assert sizes == [None, 32, 64, 127 * 32, None]
    with pytest.raises(ValueError, match="image size 40 px is not a multiple of 32"):
        vocabulary.size_token(40)


def test_more_text_than_chameleons_layout_holds_is_refused():
    config = VLCoTConfig(vocabulary="chameleon_f16")
    assert build_vocabulary(config, 8192, 49152).num_text == 49152
    with pytest.raises(ValueError, match="has 49153 tokens, but chameleon_f16 has room for 49152"):
        build_vocabulary(config, 8192, 49153)
