"""Which tokens may come next: a mask id at every position of a response.

Two grammars. `constrained` walks the whole trace: tags, sizes, newlines and brackets are forced, the degradation is
one of its 243 phrases, text is free until its closing tag. `modality` forces only what an image block leaves no choice
in (sizes repeat, rows end in a newline) and leaves text, tags and the order of fields to the model, so that the format
can be learnt.

A grammar is a table of masks over the vocabulary and, for every rollout, a walk that yields the row of that table to
use next. The scorer needs only the rows, so they travel with the tokens and nothing is replayed.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from typing import Literal, get_args

import numpy as np

from realsr_hpc.records import DegradationLabel, Level, Resize
from realsr_hpc.vlcot.sequence import FIELDS, IMAGE_FIELDS, TEXT_FIELDS, TraceCodec

Walk = Generator[int, int, None]
"""Yields a mask id, is sent the chosen token, returns after the end of turn."""
_Trie = dict[int, "_Trie"]


def degradation_phrases() -> list[str]:
    """All 243 texts that the degradation field can hold."""
    levels, resizes = get_args(Level), get_args(Resize)
    slots = itertools.product(levels, resizes, levels, levels, resizes)
    return [DegradationLabel(*slot).phrase for slot in slots]


class Grammar:
    """Masks and walks of one grammar over one vocabulary."""

    def __init__(self, codec: TraceCodec, kind: Literal["constrained", "modality"]):
        self.codec = codec
        self.kind = kind
        self._rows: dict[bytes, int] = {}
        self._table: list[np.ndarray] = []
        vocabulary = codec.vocabulary
        self._codes = self._row(vocabulary.code_to_id(code) for code in range(vocabulary.num_codes))
        self._text_tokens = [
            vocabulary.text_first + i for i in range(vocabulary.num_text) if "<" not in codec.text.decode([i])
        ]
        self._sizes = self._row(vocabulary.size_token(size) for size in codec.config.image_sizes_px)
        self._trie = self._phrase_trie()
        self._warm_up()

    @property
    def mask_table(self) -> np.ndarray:
        """bool [masks, vocabulary]; row = mask id."""
        return np.stack(self._table)

    @property
    def forced(self) -> np.ndarray:
        """bool [masks]: the row allows one token only."""
        return self.mask_table.sum(1) == 1

    @property
    def image_rows(self) -> np.ndarray:
        """bool [masks]: the row chooses among image codes."""
        return np.arange(len(self._table)) == self._codes

    @property
    def continues_block(self) -> np.ndarray:
        """bool [vocabulary]: a size, code, newline or end token, which continues an image block."""
        vocabulary = self.codec.vocabulary
        continues = np.zeros(vocabulary.size, dtype=bool)
        sizes = [vocabulary.size_token(size) for size in self.codec.config.image_sizes_px]
        codes = [vocabulary.code_to_id(code) for code in range(vocabulary.num_codes)]
        continues[[*sizes, *codes, vocabulary.newline, vocabulary.image_end]] = True
        return continues

    def walk(self) -> Walk:
        """A fresh walk of one response; `next()` it once for the first mask id."""
        return self._constrained() if self.kind == "constrained" else self._modality()

    def _row(self, tokens: Iterable[int]) -> int:
        """Mask id that allows exactly these tokens."""
        mask = np.zeros(self.codec.vocabulary.size, dtype=bool)
        mask[list(tokens)] = True
        key = np.packbits(mask).tobytes()
        if key not in self._rows:
            self._rows[key] = len(self._table)
            self._table.append(mask)
        return self._rows[key]

    def _literal(self, tokens: Iterable[int]) -> Walk:
        for token in tokens:
            yield self._row([token])

    def _phrase_trie(self) -> _Trie:
        root: _Trie = {}
        closing = self.codec.encode_text("</degradation>")
        for phrase in degradation_phrases():
            node = root
            for token in [*self.codec.encode_text(phrase), *closing]:
                node = node.setdefault(token, {})
        return root

    def _phrase(self) -> Walk:
        """One of the degradation phrases and its closing tag."""
        node = self._trie
        while node:
            node = node[(yield self._row(node))]

    def _free_text(self, name: str) -> Walk:
        """At least one token of text without '<', then the closing tag."""
        close = self.codec.encode_text(f"</{name}>")
        start, more = self._row(self._text_tokens), self._row([*self._text_tokens, close[0]])
        yield start
        for _ in range(self.codec.config.max_text_tokens - 1):
            if (yield more) == close[0]:
                break
        else:
            yield self._row(close[:1])
        yield from self._literal(close[1:])

    def _image_body(self, side: int) -> Walk:
        """Rows of codes and the end of the image, after its size tokens."""
        for _ in range(side):
            for _ in range(side):
                yield self._codes
            yield self._row([self.codec.vocabulary.newline])
        yield self._row([self.codec.vocabulary.image_end])

    def _constrained(self) -> Walk:
        vocabulary, encode = self.codec.vocabulary, self.codec.encode_text
        yield from self._literal(encode("<degradation>"))
        yield from self._phrase()
        for text, image, size in zip(TEXT_FIELDS, IMAGE_FIELDS, self.codec.config.image_sizes_px, strict=True):
            yield from self._literal(encode(f"<{text}>"))
            yield from self._free_text(text)
            token = vocabulary.size_token(size)
            yield from self._literal([*encode(f"<{image}>"), vocabulary.image_begin, token, token])
            yield from self._image_body(self.codec.side(size))
            yield from self._literal(encode(f"</{image}>"))
        yield self._row([vocabulary.end_turn])

    def _modality(self) -> Walk:
        vocabulary = self.codec.vocabulary
        text = range(vocabulary.text_first, vocabulary.text_first + vocabulary.num_text)
        outside = self._row([*text, vocabulary.image_begin, vocabulary.end_turn])
        closing = self._row([*text, vocabulary.end_turn])
        images = 0
        while True:
            # A fourth image is never part of a trace: not offering it bounds a rollout that repeats images.
            token = yield outside if images < len(IMAGE_FIELDS) else closing
            if token == vocabulary.end_turn:
                return
            if token == vocabulary.image_begin:
                images += 1
                size = yield self._sizes
                yield self._row([size])
                yield from self._image_body(self.codec.side(vocabulary.size_px(size) or 0))

    def _warm_up(self) -> None:
        """Walk every branch once, so that the mask table is complete before the first rollout.

        Ranks and the scorer then share one numbering whatever they sampled.
        """
        vocabulary = self.codec.vocabulary
        for name in FIELDS:
            for token in [*self.codec.encode_text(f"<{name}>"), *self.codec.encode_text(f"</{name}>")]:
                self._row([token])
        for token in (vocabulary.image_begin, vocabulary.image_end, vocabulary.newline, vocabulary.end_turn):
            self._row([token])
        for size in self.codec.config.image_sizes_px:
            self._row([vocabulary.size_token(size)])
        for name in TEXT_FIELDS:
            next(self._free_text(name))
            self._row([*self._text_tokens, self.codec.encode_text(f"</{name}>")[0]])
        nodes = [self._trie]
        while nodes:
            node = nodes.pop()
            if node:
                self._row(node)
                nodes += node.values()
        walk = self._modality()
        next(walk)
        text = range(vocabulary.text_first, vocabulary.text_first + vocabulary.num_text)
        self._row([*text, vocabulary.end_turn])
