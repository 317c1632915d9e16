"""How the nodes of a job agree on how its attempt ended, and whether it may be requeued.

When a rank is killed, its peers on other nodes fail too, because their connections break. Each supervisor writes how
its own ranks ended to the run's folder and waits briefly for the others, so that the root cause decides: if one rank
was killed, the job is requeued although ten others raised exceptions.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.launch.environment import Placement
from realsr_hpc.launch.health import SMI_TIMEOUT_S
from realsr_hpc.launch.requeue import PATIENCE_S
from realsr_hpc.tracking import read_progress

FAILED, UNHEALTHY, HUNG, CRASHED, REFUSED = 1, 86, 87, 88, 89
"""How an attempt ends, as exit codes, if not with DONE or STOPPED. FAILED: a rank raised an exception. UNHEALTHY: a
node failed its checks. HUNG: no step for too long. CRASHED: a rank was killed, or a node disappeared. REFUSED: another
job runs this folder."""
REQUEUED = (UNHEALTHY, HUNG, CRASHED)
"""Ends after which another attempt may succeed; a rank that raised an exception would raise it again."""
AGREE_S = 20.0
HEALTH_S = SMI_TIMEOUT_S + 10.0
"""How long an unhealthy node waits for the checks of the others, so that all unhealthy nodes are excluded at once."""
ASK_S = PATIENCE_S + 60.0
"""How long nodes wait for the one that asks Slurm to requeue the job."""
_POLL_S = 0.1
_CAUSES = (REFUSED, DONE, STOPPED, UNHEALTHY, HUNG, CRASHED, FAILED)
"""Root causes before knock-on failures. Ranks end with DONE or STOPPED by a collective decision after the last save, so
if one node reports either, a rank killed on another node had already finished (srun ends the rest of the job as soon as
the first node's task ends)."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, as one node saw it, or as all nodes agreed."""

    node: int
    code: int
    message: str = ""
    time_s: float = 0.0
    """Unix time of the last line that the deciding rank wrote; of two failures the earlier one is the cause."""
    all_present: bool = False
    """Every node of the attempt has reported and none has finished, so they can restart together."""
    unfit: tuple[str, ...] = ()
    """Slurm's names of the unhealthy nodes; in one node's own verdict at most itself."""


def agree(run_dir: Path, placement: Placement, mine: Verdict, wait_s: float = AGREE_S) -> Verdict:
    """Exchange verdicts; returns the one that all nodes of this attempt agree on.

    A node that has not reported within `wait_s` seconds counts as CRASHED.
    """
    if placement.num_nodes == 1:
        return replace(mine, all_present=mine.code not in (DONE, STOPPED))
    folder = _folder(run_dir, placement)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"node-{mine.node}.json", json.dumps(asdict(mine)))
    except OSError:  # a full disk: the others count this node as crashed, which requeues the job too
        return mine
    if mine.code in (DONE, STOPPED):  # the ranks left together, by a collective decision
        return mine
    deadline = time.time() + wait_s
    while len(_heard(folder, mine)) < placement.num_nodes and time.time() < deadline:
        time.sleep(_POLL_S)
    verdicts = _spoken(folder) or [mine]
    complete = len(verdicts) == placement.num_nodes and not {DONE, STOPPED} & {verdict.code for verdict in verdicts}
    if len(verdicts) < placement.num_nodes:
        present = min(verdict.node for verdict in verdicts)
        silent = sorted(set(range(placement.num_nodes)) - {verdict.node for verdict in verdicts})
        verdicts.append(Verdict(present, CRASHED, f"node {silent[0]} of the job is gone; {mine.message}"))
    cause = min(verdicts, key=lambda verdict: (_CAUSES.index(verdict.code), verdict.time_s))
    unfit = tuple(name for verdict in verdicts for name in verdict.unfit)
    if cause.code == UNHEALTHY:
        messages = "; ".join(verdict.message for verdict in verdicts if verdict.code == UNHEALTHY)
        cause = replace(cause, message=messages)
    return replace(cause, all_present=complete, unfit=unfit)


def tell_fit(run_dir: Path, placement: Placement) -> None:
    """Tell the other nodes that this one passed its checks and starts its ranks."""
    if placement.num_nodes > 1:
        with suppress(OSError):
            _folder(run_dir, placement).mkdir(parents=True, exist_ok=True)
            (_folder(run_dir, placement) / f"fit-{placement.node_rank}").touch()


def tell_hung(run_dir: Path, placement: Placement) -> None:
    """Tell the other nodes that this one sees a hang; a node that started later would notice it after the abort."""
    if placement.num_nodes > 1:
        with suppress(OSError):
            _folder(run_dir, placement).mkdir(parents=True, exist_ok=True)
            (_folder(run_dir, placement) / "hung").touch()


def is_told_hung(run_dir: Path, placement: Placement) -> bool:
    """Whether another node of this attempt has reported a hang."""
    return placement.num_nodes > 1 and (_folder(run_dir, placement) / "hung").exists()


def _heard(folder: Path, mine: Verdict) -> set[int]:
    """Nodes that have reported; for an unhealthy node also those that passed their checks."""
    nodes = {verdict.node for verdict in _spoken(folder)}
    if mine.code == UNHEALTHY:
        nodes |= {int(path.name.removeprefix("fit-")) for path in folder.glob("fit-*")}
    return nodes


def _spoken(folder: Path) -> list[Verdict]:
    """The verdicts that the nodes have written, as far as they can be read."""
    found = (read_json(path, Verdict) for path in sorted(folder.glob("node-*.json")))
    return [verdict for verdict in found if verdict is not None and verdict.code in _CAUSES]


def requeue_was_asked(run_dir: Path, placement: Placement) -> None:
    """Tell the other nodes that they may exit: srun would end the node that still asks if they exited earlier."""
    with suppress(OSError):
        _folder(run_dir, placement).mkdir(parents=True, exist_ok=True)
        (_folder(run_dir, placement) / "asked").touch()


def wait_for_requeue(run_dir: Path, placement: Placement) -> None:
    """Wait until the responsible node has asked for the requeue, at most ASK_S seconds."""
    deadline = time.time() + ASK_S
    while not (_folder(run_dir, placement) / "asked").exists() and time.time() < deadline:
        time.sleep(_POLL_S)


def _folder(run_dir: Path, placement: Placement) -> Path:
    """The folder in which the nodes of one attempt exchange files."""
    return runfolder.verdicts(run_dir) / f"{placement.job_id}-{placement.restarts}-{placement.attempt}"


@dataclass(frozen=True)
class Requeues:
    """requeues.json: the last step and the number of requeues since then."""

    step: int = 0
    count: int = 0


def count_requeue(run_dir: Path, restarts: int) -> int:
    """The number of requeues in a row without a new step, this one included; a run that advances is never limited.

    restarts: Slurm's own count of requeues, used if the file cannot be written because the disk is full.
    """
    path = runfolder.requeues(run_dir)
    before = read_json(path, Requeues) or Requeues()
    progress = read_progress(run_dir)
    step = progress.step if progress else 0
    count = 1 if step > before.step else before.count + 1
    try:
        write_atomically(path, json.dumps(asdict(Requeues(max(step, before.step), count))))
    except OSError:
        return restarts + 1
    return count
