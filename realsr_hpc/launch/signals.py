"""The stop flag of one process: a signal sets it, and the training loop reads it at step boundaries.

Handlers only set a flag, because saving a checkpoint is a collective operation and cannot run inside a handler. Forked
children (data workers) inherit the handlers, but the flag records its process id, so children ignore the signal.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""SIGUSR2: Slurm's early warning (NCCL uses SIGUSR1); SIGTERM: scancel, or preemption without a warning."""
HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
DUMP_SIGNAL = signal.SIGQUIT
"""Writes the stacks of all threads to stderr; the process continues."""


def die_with_parent() -> None:
    """Called in a child process: the kernel sends it SIGKILL when the parent ends for any reason. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class StopFlag:
    """Callable that returns whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked = False
        self.warned = False
        """True after SIGUSR1 or SIGUSR2: the scheduler takes the nodes back, and the job may be requeued."""
        self._pid = os.getpid()

    @classmethod
    def install(cls, *, early_warning: bool = False) -> StopFlag:
        """Install the signal handlers; returns the flag that STOP_SIGNALS set.

        DUMP_SIGNAL and aborts write the stacks of all threads to stderr.

        early_warning: SIGUSR1 sets the flag too (for a supervisor, which does not use NCCL). Otherwise SIGUSR1 is
        ignored, because Slurm sends its warning signal to every process of a job step.
        """
        flag = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, flag.ask)
        signal.signal(signal.SIGUSR1, flag.ask if early_warning else signal.SIG_IGN)
        signal.signal(signal.SIGCONT, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        faulthandler.enable(all_threads=True)
        faulthandler.register(DUMP_SIGNAL, all_threads=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        return flag

    def retire(self) -> None:
        """Ignore the signals from now on. Called before exit: Python restores default handlers during shutdown, and a
        late stop signal would change the exit code to that of a killed process."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def ask(self, number: int | None = None, _frame: FrameType | None = None) -> None:
        """Signal handler: ask this process, not its children, to stop at its next step boundary."""
        if os.getpid() == self._pid:
            self._asked = True
            self.warned |= number in (signal.SIGUSR1, signal.SIGUSR2)

    def __call__(self) -> bool:
        """Whether the process was asked to stop."""
        return self._asked
