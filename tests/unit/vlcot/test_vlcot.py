"""Vocabulary, traces and grammar: Chameleon's ids, parse(build(trace)) = trace, and parsing that never raises."""

import numpy as np
import pytest

from realsr_hpc.config.schema import VLCoTConfig
from realsr_hpc.tokenizer.text import train_text_tokenizer
from realsr_hpc.vlcot.grammar import Grammar, degradation_phrases
from realsr_hpc.vlcot.sequence import FIELDS, Trace, TraceCodec
from realsr_hpc.vlcot.vocabulary import build_vocabulary

CODES, DOWNSAMPLE = 64, 8


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    texts = [f"<{name}></{name}>" for name in FIELDS] + degradation_phrases()
    text = train_text_tokenizer(texts, 400, tmp_path_factory.mktemp("text") / "tokenizer.json")
    config = VLCoTConfig(instruction="restore <|image|> now", max_text_tokens=6)
    return TraceCodec(config, build_vocabulary(config, CODES, text.vocab_size), text, DOWNSAMPLE)


def random_trace(codec: TraceCodec, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    grids = tuple(rng.integers(0, CODES, (codec.side(size),) * 2) for size in codec.config.image_sizes_px)
    return Trace(str(rng.choice(degradation_phrases())), ("a cat", "a cat, asleep", "a cät on a mat"), grids)


def test_chameleon_ids_are_those_of_the_paper():
    vocabulary = build_vocabulary(VLCoTConfig(vocabulary="chameleon_f16"), 8192, 49152)
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos) == (0, 1, 2)
    assert (vocabulary.code_to_id(0), vocabulary.code_to_id(8191)) == (4, 8195)
    assert (vocabulary.image_end, vocabulary.image_begin) == (8196, 8197)
    assert (vocabulary.end_turn, vocabulary.newline) == (8710, 8803)
    assert [vocabulary.size_token(size) for size in (128, 256, 512)] == [8808, 8812, 8820]
    assert (vocabulary.text_first, vocabulary.size) == (16384, 65536)


def test_f8_adds_its_second_block_behind_the_text():
    vocabulary = build_vocabulary(VLCoTConfig(vocabulary="llamagen_f8"), 16384, 49152)
    assert (vocabulary.code_to_id(8192), vocabulary.code_to_id(16383)) == (65536, 73727)
    assert vocabulary.size == 73728
    assert all(vocabulary.id_to_code(vocabulary.code_to_id(code)) == code for code in range(16384))
    assert vocabulary.id_to_code(8196) is None and vocabulary.id_to_code(65535) is None


def test_a_codebook_that_the_layout_does_not_hold_is_named():
    with pytest.raises(ValueError, match="codebook_size=8192"):
        build_vocabulary(VLCoTConfig(vocabulary="chameleon_f16"), 1024, 10)


@pytest.mark.parametrize(("downsample", "tokens"), [(16, (76, 276, 1060)), (8, (276, 1060, 4164))])
def test_image_blocks_have_the_papers_lengths(codec, downsample, tokens):
    wide = TraceCodec(codec.config, codec.vocabulary, codec.text, downsample)
    sides = [size // downsample for size in (128, 256, 512)]
    assert tuple(len(wide.image_block(np.zeros((side, side), dtype=np.int64))) for side in sides) == tokens


@pytest.mark.parametrize("seed", range(5))
def test_parse_inverts_build(codec, seed):
    trace = random_trace(codec, seed)
    parsed = codec.parse(codec.build(trace))
    assert parsed.well_formed, parsed.faults
    assert (parsed.degradation, parsed.texts) == (trace.degradation, trace.texts)
    assert all(np.array_equal(a, b) for a, b in zip(parsed.images, trace.images, strict=True))


def test_filled_up_texts_put_the_images_at_one_place_and_parse_to_the_same_trace(codec):
    config = codec.config.model_copy(update={"text_slots": (20, 20, 20)})
    filling = TraceCodec(config, codec.vocabulary, codec.text, DOWNSAMPLE)
    trace = random_trace(codec, 0)
    other = Trace("light blur, upsample, light noise, light compression, upsample", ("a", "b", "c"), trace.images)
    places = [
        [place for place, token in enumerate(tokens) if token == codec.vocabulary.image_begin]
        for tokens in (filling.build(trace), filling.build(other), codec.build(trace))
    ]
    assert [b - a for a, b in zip(places[0], places[1], strict=True)] == [places[1][0] - places[0][0]] * 3
    assert places[2][1] - places[2][0] < places[0][1] - places[0][0]
    assert filling.parse(filling.build(trace)).texts == trace.texts


def test_a_text_too_long_for_its_slot_loses_its_last_words_and_is_counted(codec):
    config = codec.config.model_copy(update={"text_slots": (20, 20, 20)})
    filling = TraceCodec(config, codec.vocabulary, codec.text, DOWNSAMPLE)
    images = random_trace(codec, 0).images
    long = "a pale sky, a calm sea, " * 8
    built = [filling.build(Trace("x", (text, "b", "c"), images)) for text in ("short", long, "y" * 500)]
    assert len({len(tokens) for tokens in built}) == 1, "the images begin at one place"
    assert filling.shortened_texts == 2
    kept = filling.parse(built[1]).texts[0]
    assert kept and kept[-1] not in ", " and long.startswith(kept + ("," if long[len(kept)] == "," else " "))


def test_prompt_holds_the_instruction_and_the_image(codec):
    grid = np.arange(16).reshape(4, 4)
    prompt = codec.prompt(grid)
    block = codec.image_block(grid)
    start = prompt.index(codec.vocabulary.image_begin)
    assert prompt[start : start + len(block)] == block
    assert codec.decode_text(prompt[1:start]) == "restore "
    assert (prompt[0], prompt[-1]) == (codec.vocabulary.bos, codec.vocabulary.end_turn)


def test_parsing_any_tokens_never_raises(codec):
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(0, codec.vocabulary.size, rng.integers(0, 80)).tolist()
        parsed = codec.parse(tokens)
        assert not parsed.well_formed and parsed.faults


def test_parsing_a_damaged_trace_keeps_what_is_well_formed(codec):
    rng = np.random.default_rng(1)
    whole = codec.build(random_trace(codec, 3))
    for _ in range(300):
        tokens = list(whole)
        for position in rng.integers(0, len(tokens), 3):
            tokens[position] = int(rng.integers(0, codec.vocabulary.size))
        codec.parse(tokens)
    broken = list(whole)
    broken[len(broken) - 30] = codec.vocabulary.newline  # inside the final image
    parsed = codec.parse(broken)
    assert parsed.images[2] is None and parsed.images[0] is not None and parsed.texts[2] is not None
    assert not parsed.well_formed


def test_faults_name_order_truncation_and_size(codec):
    trace = random_trace(codec, 0)
    assert "no end of turn" in codec.parse(codec.build(trace)[:-1]).faults
    swapped = Trace(trace.degradation, trace.texts, (trace.images[1], trace.images[0], trace.images[2]))
    assert "rough_image is 64 px, not 32" in codec.parse(codec.build(swapped)).faults
    extra = [*codec.encode_text("hello"), *codec.build(trace)]
    assert codec.parse(extra).faults == ("tags out of order, or text beside them",)


@pytest.mark.parametrize("seed", range(3))
def test_constrained_walk_always_ends_in_a_well_formed_trace(codec, seed):
    grammar = Grammar(codec, "constrained")
    table, rng = grammar.mask_table, np.random.default_rng(seed)
    mask_ids, tokens = grammar.mask_ids(), []
    mask_id = next(mask_ids)
    while True:
        tokens.append(int(rng.choice(np.flatnonzero(table[mask_id]))))
        try:
            mask_id = mask_ids.send(tokens[-1])
        except StopIteration:
            break
    parsed = codec.parse(tokens)
    # Random bytes may hold a lone space as a whole text; nothing else can go wrong.
    assert all("empty" in fault for fault in parsed.faults), parsed.faults
    assert len(grammar.mask_table) == len(table), "a response met a mask that the warm-up had not made"


@pytest.mark.parametrize("kind", ["constrained", "modality"])
def test_every_true_trace_is_allowed(codec, kind):
    grammar = Grammar(codec, kind)
    table = grammar.mask_table
    trace = random_trace(codec, 7)
    mask_ids = grammar.mask_ids()
    mask_id = next(mask_ids)
    tokens = codec.build(Trace(trace.degradation, ("cat", "cat", "cat"), trace.images))
    for token in tokens[:-1]:
        assert table[mask_id][token]
        mask_id = mask_ids.send(token)
    assert table[mask_id][tokens[-1]]


def test_modality_walk_offers_no_fourth_image(codec):
    grammar = Grammar(codec, "modality")
    vocabulary = codec.vocabulary
    mask_ids = grammar.mask_ids()
    mask_id = next(mask_ids)
    for _ in range(3):
        assert grammar.mask_table[mask_id][vocabulary.image_begin]
        for token in codec.image_block(np.zeros((4, 4), dtype=np.int64)):
            mask_id = mask_ids.send(token)
    assert not grammar.mask_table[mask_id][vocabulary.image_begin]


@pytest.mark.parametrize("kind", ["constrained", "modality"])
def test_a_code_is_guessed_from_the_one_above_and_in_the_first_row_from_the_left(codec, kind):
    grammar = Grammar(codec, kind)
    phrase, grids = degradation_phrases()[0], random_trace(codec, 3).images
    tokens, state, guesses = codec.build(Trace(phrase, ("a", "b", "c"), grids)), np.int64(grammar.start), []
    for position, token in enumerate(tokens):
        if codec.vocabulary.id_to_code(token) is not None:
            guesses.append(codec.vocabulary.id_to_code(tokens[position - grammar.automaton.copies[state]]))
        state = grammar.automaton.after(state, np.int64(token))
    for grid in grids:
        side = len(grid)
        block, guesses = np.array(guesses[: side * side]).reshape(side, side), guesses[side * side :]
        assert (block[1:] == grid[:-1]).all() and (block[0, 1:] == grid[0, :-1]).all()
    assert not guesses


def test_free_text_has_at_most_its_tokens_and_no_bracket(codec):
    grammar = Grammar(codec, "constrained")
    state, text = np.int64(grammar.start), []
    is_text = np.arange(codec.vocabulary.size) >= codec.vocabulary.text_first
    while len(text) < 20:  # the first text: always its likeliest continuation, never the closing tag
        allowed = np.flatnonzero(grammar.mask_table[grammar.automaton.masks[state]])
        if text and len(allowed) == 1:
            break
        if len(allowed) > 50 and is_text[allowed].all():
            brackets = [token for token in allowed if "<" in codec.decode_text([token])]
            assert brackets == ([] if not text else codec.encode_text("</rough_understand>")[:1])
            text.append(next(token for token in allowed if token not in brackets))
            state = grammar.automaton.after(state, np.int64(text[-1]))
        else:
            state = grammar.automaton.after(state, np.int64(allowed[0]))
    assert len(text) == codec.config.max_text_tokens
