"""Notify a user's command of a run's state changes: `tracking.notify=CMD` gets one line of JSON on its standard input.

A running job does not wait for the command and never fails because of it: a command that takes too long is killed, and
failures are counted in RUN_DIR/notified.json. Message templates, retries and services belong in the command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.load import RecipeError, from_yaml
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.launch.rundir import State
from realsr_hpc.paths import SAFE_PATH, project_root
from realsr_hpc.tracking import read_progress

EVENTS: dict[State, str] = {
    "running": "start",
    "requeued": "requeue",
    "stopped": "stop",
    "failed": "failure",
    "done": "end",
}
"""The `event` of the JSON line, by the state that the run entered; other states are not reported."""
TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
"""Time limit if the job is about to exit, which would end the command too."""
LOG_BYTES = 1 << 20
"""The most that one call may write to the log; a command that writes more is killed."""
POLL_S = 0.05
MESSAGE_CHARACTERS = 2000
_counting = threading.Lock()


@dataclass(frozen=True)
class Told:
    """notified.json: counts of delivered and failed notifications, and the last failure."""

    told: int = 0
    failed: int = 0
    last_fault: str = ""


def notify(run_dir: Path, state: State, code: int | None, message: str) -> None:
    """Call the recipe's command, if any. Waits for it only if the job is about to exit, at most END_TIMEOUT_S."""
    try:
        command = from_yaml(runfolder.recipe(run_dir)).tracking.notify if state in EVENTS else None
    except RecipeError:
        return
    if command is None:
        return
    line = json.dumps(_content(run_dir, state, code, message)) + "\n"
    limit_s = TIMEOUT_S if state == "running" else END_TIMEOUT_S
    teller = threading.Thread(target=_tell, args=(run_dir, command, line, limit_s), daemon=True)
    teller.start()
    if state != "running":
        teller.join(END_TIMEOUT_S + 2.0)


def _content(run_dir: Path, state: State, code: int | None, message: str) -> dict[str, str | float | None]:
    progress = read_progress(run_dir)
    return {
        "event": EVENTS[state],
        "run": run_dir.name,
        "folder": str(run_dir),
        "state": state,
        "code": code,
        "message": message[-MESSAGE_CHARACTERS:],
        "step": progress.step if progress else None,
        "total": progress.total if progress else None,
        "job": os.environ.get("SLURM_JOB_ID"),
        "host": os.uname().nodename,
        "time_s": time.time(),
    }


def _tell(run_dir: Path, command: str, line: str, limit_s: float) -> None:
    fault = _run(run_dir, command, line, limit_s)
    if fault:
        print(f"tracking.notify: {fault}", file=sys.stderr, flush=True)
    with _counting, suppress(OSError):
        path = runfolder.notified(run_dir)
        known = read_json(path, Told) or Told()
        counts = (
            replace(known, failed=known.failed + 1, last_fault=fault) if fault else replace(known, told=known.told + 1)
        )
        write_atomically(path, json.dumps(asdict(counts)))


def _run(run_dir: Path, command: str, line: str, limit_s: float) -> str:
    """Run the command; returns why it failed, or an empty string.

    Its input is a file, not a pipe, so that a command that does not read its input cannot block the writer.
    """
    try:
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as source,
            runfolder.notify_log(run_dir).open("ab") as output,
        ):
            source.write(line)
            source.seek(0)
            process = subprocess.Popen(
                command,
                shell=True,
                cwd=project_root(),
                env={name: value for name, value in os.environ.items() if name != SAFE_PATH},  # set only for our code
                start_new_session=True,
                stdin=source,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            fault = _awaited(process, output.fileno(), limit_s)
            if fault:
                return f"{fault}: {command}"
    except OSError as error:
        return f"{error}: {command}"
    return f"ended with code {process.returncode}: {command}" if process.returncode else ""


def _awaited(process: subprocess.Popen[bytes], log: int, limit_s: float) -> str:
    """Wait for the command; returns why it was killed, or an empty string."""
    most, deadline = os.fstat(log).st_size + LOG_BYTES, time.monotonic() + limit_s
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
        written = os.fstat(log).st_size
        fault = f"wrote more than {LOG_BYTES} bytes" if written > most else ""
        if process.returncode is None and time.monotonic() > deadline:
            fault = fault or f"took longer than {limit_s:.0f} s"
        if fault:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the shell and its children, which have a session of their own
            process.wait()
            os.ftruncate(log, min(os.fstat(log).st_size, most))
        if fault or process.returncode is not None:
            return fault
