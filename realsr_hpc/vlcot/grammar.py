# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Which tokens may come next: a mask id at every position of a response.

There are two grammars. `constrained` prescribes the whole trace: tags, sizes, newlines and brackets are forced, the
degradation is one of 243 phrases, and text is free until its closing tag. `modality` forces only the determined tokens
of an image block (the size repeats, rows end in a newline) and leaves text, tags and the order of fields to the model,
so that it can learn the format.

A grammar is a table of masks over the vocabulary plus an automaton whose state at a position selects a row of that
table. The scorer needs only the row numbers, so these are stored with the tokens and scoring never runs the automaton.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from typing import Literal, get_args

import numpy as np

from realsr_hpc.records import DegradationLabel, Level, Resize
from realsr_hpc.vlcot.automaton import END, Builder
from realsr_hpc.vlcot.sequence import IMAGE_FIELDS, TEXT_FIELDS, TraceCodec

MaskIds = Generator[int, int, None]
"""Yields the mask id of the next token, is sent the chosen token, and returns after the end of turn."""
_Trie = dict[int, "_Trie"]


def degradation_phrases() -> list[str]:
    """All 243 texts that the degradation field can hold."""
    levels, resizes = get_args(Level), get_args(Resize)
    slots = itertools.product(levels, resizes, levels, levels, resizes)
    return [DegradationLabel(*slot).phrase for slot in slots]


class Grammar:
    """Masks and states of one grammar over one vocabulary."""

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
        self._states = Builder(vocabulary.size)
        self.start = self._constrained() if kind == "constrained" else self._modality()
        """State of a response's first token."""
        self.automaton = self._states.build()

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
        """bool [masks]: the row allows image codes."""
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

    def mask_ids(self) -> MaskIds:
        """Mask ids of one response, token by token: `next()` gives the first one, `send(token)` each further one."""
        state = np.int64(self.start)
        while state != END:
            token = yield int(self.automaton.masks[state])
            state = self.automaton.after(state, np.int64(token))

    def _row(self, tokens: Iterable[int]) -> int:
        """Id of the mask that allows exactly these tokens; added to the table if it is new."""
        mask = np.zeros(self.codec.vocabulary.size, dtype=bool)
        mask[list(tokens)] = True
        key = np.packbits(mask).tobytes()
        if key not in self._rows:
            self._rows[key] = len(self._table)
            self._table.append(mask)
        return self._rows[key]

    def _literal(self, tokens: Iterable[int], then: int) -> int:
        """First state of a sequence of forced tokens that ends in state `then`."""
        for token in reversed(list(tokens)):
            then = self._states.add(self._row([token]), then)
        return then

    def _phrase(self, then: int) -> int:
        """First state of a degradation phrase and its closing tag: a prefix tree over the phrases' tokens."""
        root: _Trie = {}
        closing = self.codec.encode_text("</degradation>")
        for phrase in degradation_phrases():
            node = root
            for token in [*self.codec.encode_text(phrase), *closing]:
                node = node.setdefault(token, {})

        def state(node: _Trie) -> int:
            if not node:
                return then
            return self._states.add(self._row(node), then, {token: state(below) for token, below in node.items()})

        return state(root)

    def _free_text(self, name: str, then: int) -> int:
        """States for at least one token of text without '<', then the closing tag."""
        close = self.codec.encode_text(f"</{name}>")
        start, more = self._row(self._text_tokens), self._row([*self._text_tokens, close[0]])
        closing = self._literal(close[1:], then)
        # one state per token of text; after the last one only the closing tag is allowed
        state = self._states.add(self._row(close[:1]), closing)
        for _ in range(self.codec.config.max_text_tokens - 1):
            state = self._states.add(more, state, {close[0]: closing})
        return self._states.add(start, state)

    def _image_body(self, side: int, then: int) -> int:
        """First state of an image block after its size tokens: rows of codes, newlines, end of the image."""
        state = self._literal([self.codec.vocabulary.image_end], then)
        for row in reversed(range(side)):
            state = self._literal([self.codec.vocabulary.newline], state)
            for column in reversed(range(side)):
                # guess the code above, a row and its newline back; in the first row the one to the left
                copies = side + 1 if row else min(column, 1)
                state = self._states.add(self._codes, state, copies=copies)
        return state

    def _constrained(self) -> int:
        vocabulary, encode = self.codec.vocabulary, self.codec.encode_text
        # built from the end backwards, because a state needs the number of its successor
        state = self._literal([vocabulary.end_turn], END)
        fields = zip(TEXT_FIELDS, IMAGE_FIELDS, self.codec.config.image_sizes_px, strict=True)
        for text, image, size in reversed(list(fields)):
            token = vocabulary.size_token(size)
            state = self._image_body(self.codec.side(size), self._literal(encode(f"</{image}>"), state))
            state = self._literal([*encode(f"<{image}>"), vocabulary.image_begin, token, token], state)
            state = self._literal(encode(f"<{text}>"), self._free_text(text, state))
        return self._literal(encode("<degradation>"), self._phrase(state))

    def _modality(self) -> int:
        vocabulary = self.codec.vocabulary
        text = range(vocabulary.text_first, vocabulary.text_first + vocabulary.num_text)
        # A trace never has a fourth image: not offering one bounds a rollout that repeats images.
        state = self._states.add(self._row([*text, vocabulary.end_turn]))
        self._states.lead(state, state, {vocabulary.end_turn: END})
        outside = self._row([*text, vocabulary.image_begin, vocabulary.end_turn])
        for _ in IMAGE_FIELDS:
            bodies: dict[int, int] = {}
            for size in self.codec.config.image_sizes_px:
                token = vocabulary.size_token(size)
                bodies[token] = self._literal([token], self._image_body(self.codec.side(size), state))
            sizes = self._states.add(self._sizes, END, bodies)
            state = self._states.add(outside)
            self._states.lead(state, state, {vocabulary.image_begin: sizes, vocabulary.end_turn: END})
        return state
