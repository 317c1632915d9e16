"""How the nodes of a job agree on how its attempt ended, and whether it may be requeued.

When a rank is killed, its partners on other nodes fail too, because their connections break. Each supervisor writes its
findings to the run's folder and waits briefly for the others, so that the root cause decides: one killed rank requeues
the job although ten others raised.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.launch.environment import Placement
from realsr_hpc.launch.health import SMI_TIMEOUT_S
from realsr_hpc.launch.requeue import PATIENCE_S
from realsr_hpc.tracking import read_progress

DONE, FAILED, STOPPED, UNHEALTHY, HUNG, CRASHED, REFUSED = 0, 1, 85, 86, 87, 88, 89
"""How an attempt ends, as exit codes. FAILED: a rank raised; CRASHED: a rank was killed, or a node went away.
REFUSED: another job runs this folder."""
REQUEUED = (UNHEALTHY, HUNG, CRASHED)
"""Ends that another attempt, perhaps on other nodes, can mend; a rank that raised would raise again."""
AGREE_S = 20.0
HEALTH_S = SMI_TIMEOUT_S + 10.0
"""How long an unfit node waits until the others have looked at themselves, to exclude all that are unfit at once."""
ASK_S = PATIENCE_S + 60.0
"""How long nodes wait for the one that asks Slurm to requeue the job."""
_POLL_S = 0.1
_CAUSES = (REFUSED, DONE, STOPPED, UNHEALTHY, HUNG, CRASHED, FAILED)
"""Causes before their consequences. Ranks leave DONE or STOPPED by a collective decision, after the last save: where
one node saw that, a rank that was killed on another was already on its way out (srun ends the rest of the job when
the first node leaves)."""


@dataclass(frozen=True)
class Verdict:
    """What one node saw of the end."""

    node: int
    code: int
    message: str = ""
    time_s: float = 0.0
    """When the rank that decided it wrote its last words: the earlier of two failures is the cause."""
    all_present: bool = False
    """Every node of the attempt spoke, and none has left with its work done: they can go on together."""
    unfit: tuple[str, ...] = ()
    """Names of the nodes that are unfit, as Slurm has them; of one node's own verdict: itself."""


def agree(run_dir: Path, placement: Placement, mine: Verdict, wait_s: float = AGREE_S) -> Verdict:
    """The verdict that all nodes of this attempt come to; a node silent for `wait_s` counts as gone (CRASHED)."""
    if placement.num_nodes == 1:
        return replace(mine, all_present=mine.code not in (DONE, STOPPED))
    folder = _folder(run_dir, placement)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"node-{mine.node}.json", json.dumps(asdict(mine)))
    except OSError:  # a full disk: to the others this node is gone, and that requeues the job too
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
        said = "; ".join(verdict.message for verdict in verdicts if verdict.code == UNHEALTHY)
        cause = replace(cause, message=said)
    return replace(cause, all_present=complete, unfit=unfit)


def tell_fit(run_dir: Path, placement: Placement) -> None:
    """This node has looked at itself and starts its ranks."""
    if placement.num_nodes > 1:
        with suppress(OSError):
            _folder(run_dir, placement).mkdir(parents=True, exist_ok=True)
            (_folder(run_dir, placement) / f"fit-{placement.node_rank}").touch()


def tell_hung(run_dir: Path, placement: Placement) -> None:
    """This node sees no step for too long. Nodes that started later would see it later, after their ranks have gone."""
    if placement.num_nodes > 1:
        with suppress(OSError):
            _folder(run_dir, placement).mkdir(parents=True, exist_ok=True)
            (_folder(run_dir, placement) / "hung").touch()


def is_told_hung(run_dir: Path, placement: Placement) -> bool:
    """Whether a node of this attempt has seen a hang."""
    return placement.num_nodes > 1 and (_folder(run_dir, placement) / "hung").exists()


def _heard(folder: Path, mine: Verdict) -> set[int]:
    """Nodes that need not be waited for: those that spoke; for an unfit node also those that found themselves fit."""
    nodes = {verdict.node for verdict in _spoken(folder)}
    if mine.code == UNHEALTHY:
        nodes |= {int(path.name.removeprefix("fit-")) for path in folder.glob("fit-*")}
    return nodes


def _spoken(folder: Path) -> list[Verdict]:
    """What the nodes have written, as far as it can be read."""
    found = (read_json(path, Verdict) for path in sorted(folder.glob("node-*.json")))
    return [verdict for verdict in found if verdict is not None and verdict.code in _CAUSES]


def requeue_was_asked(run_dir: Path, placement: Placement) -> None:
    """Tell the other nodes that they may leave: leaving earlier would make srun end the node that still asks."""
    with suppress(OSError):
        _folder(run_dir, placement).mkdir(parents=True, exist_ok=True)
        (_folder(run_dir, placement) / "asked").touch()


def wait_for_requeue(run_dir: Path, placement: Placement) -> None:
    """Until the node that speaks has asked for the requeue, or ASK_S."""
    deadline = time.time() + ASK_S
    while not (_folder(run_dir, placement) / "asked").exists() and time.time() < deadline:
        time.sleep(_POLL_S)


def _folder(run_dir: Path, placement: Placement) -> Path:
    """What the nodes of one attempt tell each other."""
    return runfolder.verdicts(run_dir) / f"{placement.job_id}-{placement.restarts}-{placement.attempt}"


@dataclass(frozen=True)
class Requeues:
    """requeues.json: how many there were since the last new step."""

    step: int = 0
    count: int = 0


def count_requeue(run_dir: Path, restarts: int) -> int:
    """Requeues in a row without a new step, this one included: a run that gets on may be requeued for ever.

    restarts: Slurm's own count, which bounds them when the folder's disk is full.
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
