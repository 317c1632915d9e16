"""The supervisor of one node of a job: start the ranks, watch them, and end all of them together.

- A rank fails: the others are ended at once, so that none waits in a collective operation; the last lines of the failed
  rank's log become the job's message. A rank that raised an exception is not retried.
- A rank is killed (SIGKILL, a crash in native code): the ranks are restarted in the allocation, up to
  `cluster.restarts_in_place` times without a new step; then the job requeues itself.
- A signal arrives (time limit, preemption, cancel): it is forwarded to the ranks; if they stop with a checkpoint, the
  job requeues itself.
- No event or progress for `cluster.hang_limit_s`: the ranks write their stacks to their logs, are aborted, and the job
  requeues itself.
- Two jobs for one folder: the first node's supervisor holds a lock, and the second job changes nothing.

submitit only calls `node_job`. Its own requeueing is not used, because it races with Slurm's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.environment import Placement
from realsr_hpc.launch.health import node_faults
from realsr_hpc.launch.notify import notify
from realsr_hpc.launch.requeue import SAME_JOB_WAIT_S, exclude, requeue, this_node
from realsr_hpc.launch.rundir import (
    LAUNCH_VARIABLE,
    Job,
    State,
    read_job,
    write_job,
    write_status,
)
from realsr_hpc.launch.signals import DUMP_SIGNAL, HANDLED_SIGNALS, StopFlag, die_with_parent
from realsr_hpc.launch.verdict import (
    CRASHED,
    FAILED,
    HEALTH_S,
    HUNG,
    REFUSED,
    REQUEUED,
    UNHEALTHY,
    Verdict,
    agree,
    count_requeue,
    is_told_hung,
    requeue_was_asked,
    tell_fit,
    tell_hung,
    wait_for_requeue,
)
from realsr_hpc.locks import LockRefused, hold
from realsr_hpc.paths import module_command, project_root
from realsr_hpc.tracking import read_progress, recipe_of, set_status
from realsr_hpc.tracking.delivery import brief

POLL_S = 0.2
END_GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL of the other ranks after one failed."""
DUMP_S = 5.0
"""Seconds that the other nodes get to notice a hang and let their ranks write their stacks."""
LOG_END_LINES = 25
OTHER_JOB_WAIT_S = 5.0


def node_job(run_dir: Path, launch: str = "") -> int:
    """The function that submitit pickles and calls on every node.

    Raises SystemExit unless it succeeds, so that submitit does not record a result.
    """
    os.environ[LAUNCH_VARIABLE] = launch
    code = run_node(run_dir)
    if code:
        raise SystemExit(code)
    return code


def run_node(run_dir: Path) -> int:
    """Run this node's ranks to their end; returns the job's exit code: 0, 85 (stopped with a checkpoint) or failed."""
    stop = StopFlag.install(early_warning=True)
    config = recipe_of(run_dir)
    placement = Placement.find(config, os.environ)
    with ExitStack() as stack:
        if placement.node_rank == 0 and (refused := _take(run_dir, placement, stack)):
            agreed = agree(run_dir, placement, refused, wait_s=0.0)
            return _finish(run_dir, placement, config, agreed, send_back=refused.code == CRASHED)
        verdict = _run_attempts(config, run_dir, placement, stop)
        # A plain scancel sends only SIGTERM, without a warning signal: the job must not come back.
        send_back = verdict.code in REQUEUED or (verdict.code == STOPPED and stop.warned)
        return _finish(run_dir, placement, config, verdict, send_back=send_back)


def _take(run_dir: Path, placement: Placement, stack: ExitStack) -> Verdict | None:
    """Hold the run's lock until `stack` closes. If another process holds it, return the verdict instead of None.

    A node that went down may still hold the lock for an earlier attempt of the same job until the file server releases
    it, so a holder from the same job is waited for longer (SAME_JOB_WAIT_S).
    """
    job = f"Slurm job {placement.job_id}" if placement.job_id else "local"
    for wait_s in (OTHER_JOB_WAIT_S, SAME_JOB_WAIT_S):
        try:
            stack.enter_context(hold(runfolder.lock(run_dir), job, wait_s))
            return None
        except LockRefused as error:
            same = placement.job_id and error.holder is not None and error.holder.what == job
            message = f"{run_dir} is already being run: {error}"
            if not same:
                return Verdict(0, REFUSED, message, time.time())
    return Verdict(0, CRASHED, message, time.time())


def _run_attempts(config: RunConfig, run_dir: Path, placement: Placement, stop: StopFlag) -> Verdict:
    """Run the ranks, restarting them after a crash while all nodes are present.

    At most `cluster.restarts_in_place` restarts without a new step in between.
    """
    step, left = _last_step(run_dir), config.cluster.restarts_in_place
    while True:
        verdict = _attempt(config, run_dir, placement, stop)
        if (now := _last_step(run_dir)) > step:
            step, left = now, config.cluster.restarts_in_place
        if verdict.code != CRASHED or not verdict.all_present or stop() or not left:
            return verdict
        left -= 1
        print(f"{verdict.message}\nrestarted in the same allocation", file=sys.stderr, flush=True)
        placement = placement.again()


def _attempt(config: RunConfig, run_dir: Path, placement: Placement, stop: StopFlag) -> Verdict:
    if faults := node_faults(config, run_dir):
        message = f"node {os.uname().nodename}: {'; '.join(faults)}"
        unfit = Verdict(placement.node_rank, UNHEALTHY, message, unfit=(this_node(),))
        return agree(run_dir, placement, unfit, wait_s=HEALTH_S)
    tell_fit(run_dir, placement)
    if placement.node_rank == 0 and (message := placement.port_fault()):
        return agree(run_dir, placement, Verdict(0, CRASHED, message), wait_s=0.0)
    if placement.node_rank == 0:
        _remember_job(run_dir, placement)
        _set_state(run_dir, "running")
    ranks = start_ranks(config, run_dir, placement)
    code, message, time_s = watch(ranks, config, run_dir, placement, stop)
    return agree(run_dir, placement, Verdict(placement.node_rank, code, message, time_s))


def _last_step(run_dir: Path) -> int:
    progress = read_progress(run_dir)
    return progress.step if progress else 0


def start_ranks(
    config: RunConfig, run_dir: Path, placement: Placement, command: list[str] | None = None
) -> dict[int, subprocess.Popen[bytes]]:
    """Start one process per task; returns them by global rank.

    Each process is killed when this supervisor ends, and writes to its own log.

    command: the command line of a rank; None: train this run.
    """
    command = command or module_command("realsr_hpc", str(run_dir))
    ranks = {}
    for local_rank in range(placement.tasks_per_node):
        extra = placement.rank_environment(config, local_rank)
        rank = int(extra["RANK"])
        log = runfolder.rank_log(run_dir, rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {os.uname().nodename}\n".encode())
            output.flush()
            ranks[rank] = subprocess.Popen(
                command,
                env={**os.environ, **extra},
                cwd=project_root(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_prepare_rank,
            )
    return ranks


def watch(
    ranks: dict[int, subprocess.Popen[bytes]], config: RunConfig, run_dir: Path, placement: Placement, stop: StopFlag
) -> tuple[int, str, float]:
    """Wait until all ranks have ended; returns exit code, message, and the Unix time when the message was written."""
    forwarded = False
    started = time.time()
    while True:
        codes = {rank: process.poll() for rank, process in ranks.items()}
        failed: dict[int, int | None] = {
            rank: code for rank, code in codes.items() if code not in (None, DONE, STOPPED)
        }
        if failed:
            end_ranks(ranks)
            rank = _first_to_fail(run_dir, failed)
            code = failed[rank] or FAILED
            return CRASHED if code < 0 else FAILED, _log_end(run_dir, rank, code), _last_written(run_dir, rank)
        if all(code is not None for code in codes.values()):
            return max(code or 0 for code in codes.values()), "", time.time()
        if stop() and not forwarded:
            _signal(ranks, signal.SIGUSR2)
            forwarded = True
            if 0 in ranks:
                _set_state(run_dir, "stopping")
        silent_s = time.time() - max(started, _last_activity(run_dir))
        if silent_s > config.cluster.hang_limit_s or is_told_hung(run_dir, placement):
            # Every rank writes its stack before any is ended: a rank whose peer disappears raises, and the stack that
            # shows where it hung is lost.
            tell_hung(run_dir, placement)
            _signal(ranks, DUMP_SIGNAL)
            time.sleep(DUMP_S)
            end_ranks(ranks, signal.SIGABRT)
            logs, limit_s = runfolder.logs(run_dir), config.cluster.hang_limit_s
            message = f"no step for {limit_s} s: aborted; the stacks are in {logs}"
            return HUNG, message, time.time()
        time.sleep(POLL_S)


def end_ranks(ranks: dict[int, subprocess.Popen[bytes]], number: signal.Signals = signal.SIGTERM) -> None:
    """Send signal `number`, wait up to END_GRACE_S (an abort writes stacks), then SIGKILL. Only these processes."""
    _signal(ranks, number)
    _signal(ranks, signal.SIGCONT)  # a rank that was stopped takes the signal only then
    deadline = time.time() + END_GRACE_S
    while time.time() < deadline and any(process.poll() is None for process in ranks.values()):
        time.sleep(POLL_S)
    _signal(ranks, signal.SIGKILL)
    for process in ranks.values():
        process.wait()


def _finish(run_dir: Path, placement: Placement, config: RunConfig, verdict: Verdict, *, send_back: bool) -> int:
    """Requeue if that can help, else write the run's final state; one node does this on behalf of all."""
    code, message = verdict.code, verdict.message
    responsible = placement.node_rank == (verdict.node if code in REQUEUED else 0)
    if send_back and placement.job_id:
        if not responsible:
            wait_for_requeue(run_dir, placement)
            return code
        attempts = count_requeue(run_dir, placement.restarts)
        may_return = attempts <= config.cluster.max_requeues
        if may_return:
            _send_back(run_dir, placement, verdict)
        requeue_was_asked(run_dir, placement)
        if may_return:
            return code
        message = f"{message}\nnot requeued: {attempts} attempts in a row completed no new step (cluster.max_requeues)"
    if code == REFUSED:  # another job runs this folder: leave its state untouched
        print(message, file=sys.stderr, flush=True)
    elif code == DONE and responsible:
        _set_state(run_dir, "done", 0)
    elif code == STOPPED and responsible:
        note = f"{message} stopped with a checkpoint; launch it again to continue"
        _set_state(run_dir, "stopped", code, note.strip())
    elif code not in (DONE, STOPPED) and placement.node_rank == verdict.node:
        print(message, file=sys.stderr, flush=True)
        _set_state(run_dir, "failed", code, message)
        _mark_failed(run_dir)
    return code


def _send_back(run_dir: Path, placement: Placement, verdict: Verdict) -> None:
    code, message = verdict.code, verdict.message
    _set_state(run_dir, "requeued", code, message)
    if requeue(placement.job_id):
        if verdict.unfit:
            exclude(placement.job_id, verdict.unfit, runfolder.exclude_lock(run_dir))
    else:
        state = "stopped" if code == STOPPED else "failed"
        _set_state(run_dir, state, code, f"{message} requeueing failed: launch it again to continue".strip())


def _set_state(run_dir: Path, state: State, code: int | None = None, message: str = "") -> None:
    """Write the run's state and notify the user's command. A full disk does not keep the job from being requeued."""
    try:
        write_status(run_dir, state, code, message)
    except OSError as error:
        print(f"state {state} not written ({error})", file=sys.stderr, flush=True)
    notify(run_dir, state, code, message)


def _remember_job(run_dir: Path, placement: Placement) -> None:
    """Record the job for `realsr-hpc jobs` if plain sbatch started it; jobs from `submit` are already recorded."""
    job = read_job(run_dir)
    if placement.job_id and (job is None or job.job_id != placement.job_id):
        launch = os.environ.get(LAUNCH_VARIABLE, "")
        write_job(run_dir, Job("slurm", placement.job_id, "", str(runfolder.rank_log(run_dir, 0)), launch, time.time()))


def _mark_failed(run_dir: Path) -> None:
    try:
        set_status(run_dir, "FAILED")
    except Exception as error:  # tracking never decides how a run ends
        print(f"tracking: status FAILED not delivered ({brief(error)})", file=sys.stderr)


def _signal(ranks: dict[int, subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in ranks.values():
        if process.poll() is None:
            process.send_signal(number)


def _last_activity(run_dir: Path) -> float:
    """Unix time of the last progress or event that the run wrote; 0 before the first."""
    paths = (runfolder.progress(run_dir), runfolder.events(run_dir))
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _first_to_fail(run_dir: Path, failed: dict[int, int | None]) -> int:
    """The rank that caused the failure: one that was killed, else the one whose log ended first."""
    return min(failed, key=lambda rank: ((failed[rank] or 0) >= 0, _last_written(run_dir, rank)))


def _last_written(run_dir: Path, rank: int) -> float:
    return runfolder.rank_log(run_dir, rank).stat().st_mtime


def _log_end(run_dir: Path, rank: int, code: int) -> str:
    """How the rank ended, with the last LOG_END_LINES lines of its log."""
    log = runfolder.rank_log(run_dir, rank)
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    with log.open(encoding="utf-8", errors="replace") as file:
        lines = "".join(deque(file, maxlen=LOG_END_LINES)).rstrip()
    return f"rank {rank} {ended}; the end of {log}:\n{lines}"


def _prepare_rank() -> None:
    """Runs in the child before exec: SIGKILL if the supervisor ends; stop signals stay blocked until the rank is ready.

    `StopFlag.install` unblocks them.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
