"""What a piece of code allocates: every allocation and release of PyTorch's CPU allocator while it runs."""

from __future__ import annotations

import gc
import os
from types import TracebackType
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself at each start

from torch.profiler import ProfilerActivity, profile  # noqa: E402


class Allocations:
    """`with Allocations() as seen: ...`, then `seen.rise` and `seen.peak`, in bytes above the start.

    Exact, temporary tensors inside kernels included. What was allocated before and is released inside does not count.
    Not for long loops: each allocation is an event that is kept until the end.
    """

    rise: int
    """What the code left allocated."""
    peak: int
    """The most that was allocated at one moment."""

    def __enter__(self) -> Allocations:
        gc.collect()  # garbage of an earlier measurement must not be released inside this one
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.collect()  # what only cycles hold is no longer in use
        self._profile.__exit__(kind, error, trace)
        profiler: Any = self._profile.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        self.rise = self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.rise += event.nbytes()
            self.peak = max(self.peak, self.rise)
