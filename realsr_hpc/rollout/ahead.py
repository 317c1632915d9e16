"""Exact look-ahead: guesses the next tokens and checks which guesses were right.

A drawn token is a function of its prefix and of its own noise (behaviour/draws.py). So one pass can feed W tokens: the
last sampled one and guesses for the next W - 1. As long as the guesses equal the draws at their positions, the prefix
was right and the following draw is final. Everything after the first wrong guess is drawn again, with the discarded
draws as the next guesses (Jacobi iteration: Song et al. 2021; Santilli et al. 2023). For any guesses, the result equals
decoding one token at a time.

The state of this module is a few small integer arrays in host memory. Every rank receives all draws and updates the
same arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realsr_hpc.vlcot.automaton import END
from realsr_hpc.vlcot.grammar import Grammar

WIDEST = 64
"""Largest number of tokens per row in one pass."""


@dataclass(frozen=True)
class Window:
    """The input of one pass: n rows of W positions each; int64 arrays [n, W], except `first`.

    Example, n = 1 and W = 3, a row with 5 final tokens: `first` [4], `fed` [[token 4, guess 5, guess 6]]. The pass
    draws the tokens 5, 6 and 7. Token 5 is final; token 6 is final if guess 5 equals the drawn token 5, and so on.
    """

    fed: np.ndarray
    """The last final token, then W - 1 guesses."""
    first: np.ndarray
    """[n]: position of the first fed token."""
    states: np.ndarray
    """Grammar state of the token drawn after each fed token."""
    starts: np.ndarray
    """First position that each fed token of the unconditional stream sees."""


class Ahead:
    """The tokens of a batch of rollouts: the first `count` of a row are final, the ones after them are guesses."""

    def __init__(self, grammar: Grammar, rows: int, limit: int):
        vocabulary = grammar.codec.vocabulary
        self.grammar, self.limit, self.pad = grammar, limit, vocabulary.pad
        self._table = grammar.mask_table
        self._first_allowed = self._table.argmax(1)
        self._continues = grammar.continues_block
        self.tokens = np.full((rows, limit + WIDEST), vocabulary.pad, dtype=np.int64)
        self.count = np.zeros(rows, dtype=np.int64)
        """[rows]: number of final tokens."""
        self.state = np.full(rows, grammar.start, dtype=np.int64)
        """[rows]: grammar state of the next token."""
        self._start = np.zeros(rows, dtype=np.int64)
        """[rows]: first position that the unconditional stream sees from the token fed next."""
        self._guessed = np.zeros(rows, dtype=np.int64)
        """[rows]: `tokens` holds guesses up to this position."""

    def alive(self, rows: Sequence[int]) -> np.ndarray:
        """Which of these rows are not finished, bool [n]."""
        rows = np.asarray(rows)  # pyright: ignore[reportAssignmentType]
        return (self.state[rows] != END) & (self.count[rows] < self.limit)

    def window(self, rows: Sequence[int], width: int) -> Window:
        """The input of the next pass over these rows.

        Before the first draw, `fed` is padding and unused: the prompt gives the first logits.
        """
        rows = np.asarray(rows)  # pyright: ignore[reportAssignmentType]
        count, state = self.count[rows], self.state[rows]
        # Column by column, [n] each: the grammar state of a position follows from the token before it.
        fed, states, starts = (np.empty((len(rows), width), dtype=np.int64) for _ in range(3))
        fed[:, 0] = self.tokens[rows, count - 1]
        start = self._start[rows]
        for step in range(width):
            if step:
                fed[:, step] = self._guess(rows, count + step - 1, state)  # pyright: ignore[reportArgumentType]
                state = self.grammar.automaton.after(state, fed[:, step])
            # The unconditional stream sees only the current image block: a token that does not continue the block is
            # the first one that it sees. The fed token is at position count + step - 1.
            start = np.where(self._continues[fed[:, step]], start, count + step - 1)
            states[:, step], starts[:, step] = state, start
        return Window(fed, count - 1, states, starts)

    def accept(self, rows: Sequence[int], window: Window, drawn: np.ndarray) -> np.ndarray:
        """Keep the draws [n, W] whose prefix was right; the others become guesses.

        Returns which draws are kept, bool [n, W].
        """
        rows = np.asarray(rows)  # pyright: ignore[reportAssignmentType]
        width = drawn.shape[1]
        count = self.count[rows]
        offsets = np.arange(width)
        final = np.ones(drawn.shape, dtype=bool)  # [n, W]; the first draw follows a final token, so it is final
        final[:, 1:] = np.logical_and.accumulate(window.fed[:, 1:] == drawn[:, :-1], axis=1)
        final &= (window.states != END) & (count[:, None] + offsets < self.limit)
        number = final.sum(1)  # [n]: draws that are kept of each row
        # all W draws are stored: those after the final ones are the next guesses
        self.tokens[rows[:, None], count[:, None] + offsets] = drawn  # pyright: ignore[reportArgumentType, reportCallIssue]
        some = np.flatnonzero(number)
        last = number[some] - 1
        self.state[rows[some]] = self.grammar.automaton.after(window.states[some, last], drawn[some, last])  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._start[rows[some]] = window.starts[some, last]  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._guessed[rows] = count + width
        self.count[rows] = count + number
        return final

    def replay(self, row: int) -> Ahead:
        """A copy of one row after its first token, whose guesses are the tokens that followed."""
        again, count = Ahead(self.grammar, 1, self.limit), self.count[row]
        again.tokens[0, :count] = self.tokens[row, :count]
        again.count[0], again._guessed[0] = 1, count
        again.state[0] = self.grammar.automaton.after(again.state, again.tokens[0, :1])[0]
        return again

    def _guess(self, rows: np.ndarray, position: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Guess the tokens [n] at these positions and grammar states; also stored, because later guesses copy them."""
        back = self.grammar.automaton.copies[state]  # [n]: distance to the code above; 0: unknown, guess the last token
        known = position < self._guessed[rows]
        guess = self.tokens[rows, np.where(known, position, position - np.maximum(back, 1))]
        masks = self.grammar.automaton.masks[state]
        # a guess that the grammar does not allow cannot be drawn: take the first allowed token (the only one if forced)
        guess = np.where(self._table[masks, guess], guess, self._first_allowed[masks])
        self.tokens[rows, position] = guess
        return guess
