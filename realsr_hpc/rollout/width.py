"""Chooses how many tokens per row a pass feeds: the recipe's number, or the one that gives most tokens per second.

With `auto` the first passes try widths 1, 2, 4, ... as long as they pay off. Later passes use the best width and
occasionally measure a neighbour again, because the cost of a pass grows with the cache and guesses are better in some
images than in others. The measurements affect only the speed, never the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from realsr_hpc.config.derived import pass_tokens, widest_lookahead
from realsr_hpc.config.learning import RolloutConfig

TRIALS = 3
"""Number of passes of each width before the next is tried."""
AGAIN_EVERY = 32
"""Number of passes between two measurements of a neighbouring width."""
WORSE = 0.7
"""Wider passes are not tried once a width's rate falls below this share of the best rate."""


@dataclass
class _Seen:
    """Measurements of one width: running mean of accepted tokens per row, and seconds per pass."""

    passes: int = 0
    accepted: float = 0.0
    seconds: float = 0.0

    def add(self, accepted: float, seconds: float) -> None:
        """Add the measurement of one pass."""
        self.passes += 1
        self.accepted += (accepted - self.accepted) * max(1 / self.passes, 0.1)
        # The minimum of recent passes, because other load only adds time. It grows slowly, because the cache does.
        self.seconds = seconds if self.passes == 1 else min(seconds, 1.02 * self.seconds)

    @property
    def rate(self) -> float:
        """Accepted tokens per row and second."""
        return self.accepted / self.seconds if self.seconds else 0.0


@dataclass
class _Situation:
    """The widths tried for one number of rows and one kind of tokens."""

    seen: dict[int, _Seen] = field(default_factory=dict)
    passes: int = 0


class Width:
    """Chooses the width of every pass and measures the result.

    Example: `width.choose(16, images=True)` for 16 rows of which most are in image blocks, then
    `width.record(16, True, 4, accepted=2.3, seconds=0.012)`.
    """

    def __init__(self, config: RolloutConfig):
        self.config = config
        self.fixed = None if config.lookahead == "auto" else config.lookahead
        """The recipe's width; None: choose the fastest."""
        self.widest = widest_lookahead(config)
        self._situations: dict[tuple[int, bool], _Situation] = {}

    def choose(self, rows: int, images: bool) -> int:
        """Width of the next pass over this many rows; images: most of them are in image blocks."""
        if self.fixed is not None:
            return self.fixed
        situation = self._situation(rows, images)
        seen, best = situation.seen, 0.0
        widest = min(self.widest, pass_tokens(self.config, rows) // rows)
        for width in (2**power for power in range(widest.bit_length())):
            if width not in seen or seen[width].passes < TRIALS:
                return width
            best = max(best, seen[width].rate)
            if seen[width].rate < WORSE * best:
                break
        # all widths have been tried: use the fastest, and measure a neighbour again now and then
        widths = sorted(seen)
        place = max(range(len(widths)), key=lambda place: seen[widths[place]].rate)
        if situation.passes % AGAIN_EVERY == 0:
            place += 1 if situation.passes // AGAIN_EVERY % 2 else -1
        return widths[min(max(place, 0), len(widths) - 1)]

    def record(self, rows: int, images: bool, width: int, accepted: float, seconds: float) -> None:
        """Record that a pass of this width kept `accepted` tokens per row and took `seconds`."""
        if self.fixed is None:
            situation = self._situation(rows, images)
            situation.passes += 1
            situation.seen.setdefault(width, _Seen()).add(accepted, seconds)

    def _situation(self, rows: int, images: bool) -> _Situation:
        return self._situations.setdefault((rows.bit_length(), images), _Situation())
