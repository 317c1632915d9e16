"""A grammar as a finite automaton: a state at every position of a response, and the state after a token.

A state is an integer, so one array operation advances many rollouts, including guessed tokens that are not sampled yet,
and decoding can restart from any earlier state. grammar.py defines which states a grammar has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

END = 0
"""The state after the end of turn; it has no mask and is its own successor."""


@dataclass(frozen=True)
class Automaton:
    """S states over a vocabulary of V tokens.

    Example: `automaton.after(np.array([3, 3]), np.array([17, 900]))` are the states of two rollouts that are in state
    3 and receive the tokens 17 and 900.
    """

    masks: np.ndarray
    """int64 [S]: mask id of the tokens allowed in this state; of `END`: 0."""
    copies: np.ndarray
    """int64 [S]: distance back to the token that the next one likely equals: the code above in an image; 0: unknown."""
    default: np.ndarray
    """int64 [S]: state after any token that has no branch."""
    branches: np.ndarray
    """int64 [B], ascending: state * V + token."""
    targets: np.ndarray
    """int64 [B]: state after that token."""
    vocabulary_size: int

    def after(self, states: np.ndarray | np.int64, tokens: np.ndarray | np.int64) -> np.ndarray:
        """States after one allowed token each; states, tokens and result are int64 of one shape."""
        result = self.default[states]
        # `branches` is sorted, so a binary search finds (state, token) pairs with their own successor
        keys = states * self.vocabulary_size + tokens
        places = np.searchsorted(self.branches, keys).clip(max=len(self.branches) - 1)
        return np.where(self.branches[places] == keys, self.targets[places], result)


class Builder:
    """Collects states; every method that adds one returns its number."""

    def __init__(self, vocabulary_size: int):
        self._masks, self._copies, self._default = [0], [0], [END]
        self._branches: dict[int, int] = {}
        self._size = vocabulary_size

    def add(self, mask: int, default: int = END, branches: Mapping[int, int] | None = None, copies: int = 0) -> int:
        """Add a state with this mask id, see `Automaton`; branches: token -> state. Returns its number."""
        self._masks.append(mask)
        self._copies.append(copies)
        self._default.append(default)
        return self.lead(len(self._masks) - 1, default, branches or {})

    def lead(self, state: int, default: int, branches: Mapping[int, int]) -> int:
        """Set the successors of an existing state, as cycles need; returns its number."""
        self._default[state] = default
        self._branches |= {state * self._size + token: target for token, target in branches.items()}
        return state

    def build(self) -> Automaton:
        """The automaton of all states so far."""
        keys = sorted(self._branches)
        columns = (self._masks, self._copies, self._default, keys, [self._branches[key] for key in keys])
        masks, copies, default, branches, targets = (np.array(column, dtype=np.int64) for column in columns)
        return Automaton(masks, copies, default, branches, targets, self._size)
