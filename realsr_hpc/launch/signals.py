"""The stop flag of one process: a signal sets it, and the training loop reads it at step boundaries.

Handlers only set a flag, because a checkpoint is collective and cannot be taken inside a handler. Processes that a
training process forks (data workers) inherit the handlers; there the flag belongs to another process id and the
signal is ignored, so that a worker neither stops early nor writes anything.
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
"""Writes the stacks of all threads to stderr; the process goes on."""


def die_with_parent() -> None:
    """In a child process: have the kernel send SIGKILL when the parent ends, however it ends. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class StopFlag:
    """Callable that tells whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked = False
        self.warned = False
        """SIGUSR1 or 2 came: the scheduler wants its nodes back and the job may go on later."""
        self._pid = os.getpid()

    @classmethod
    def install(cls, *, early_warning: bool = False) -> StopFlag:
        """A flag set by STOP_SIGNALS; stacks of all threads go to stderr at DUMP_SIGNAL and at an abort.

        With `early_warning` (a supervisor: it runs no NCCL) SIGUSR1 sets it as well, and elsewhere it does nothing:
        Slurm sends a warning signal to every process of a step.
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
        """The process is leaving and no longer listens: Python puts default handlers back while it shuts down, and a
        late stop signal would turn its exit code into that of a killed process."""
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def ask(self, number: int | None = None, _frame: FrameType | None = None) -> None:
        """Ask this process, and no child of it, to stop at its next step boundary."""
        if os.getpid() == self._pid:
            self._asked = True
            self.warned |= number in (signal.SIGUSR1, signal.SIGUSR2)

    def __call__(self) -> bool:
        """Whether the process was asked."""
        return self._asked
