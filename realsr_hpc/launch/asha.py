"""`sampler=asha`: the loop that submits a sweep's runs, watches them reach their rungs, and promotes the best.

A rung is a step at which runs stop with a checkpoint (`checkpoint.stop_at_step`). A promoted run is resumed, so a run
that reaches its end is bitwise equal to one that was never paused. OUTPUT_ROOT/sweeps/NAME/asha.json lists the runs and
the rung that each was sent to; their results are read from their folders. The launcher may therefore be killed at any
moment: the runs continue to their rung, and launching the sweep again continues from their folders. halving.py decides
the next move; proposals.py decides which recipes are tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, nan
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc import runfolder
from realsr_hpc.config.load import RecipeError, compose_each, override, search_space
from realsr_hpc.config.metrics import num_steps
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import read_json, write_atomically
from realsr_hpc.launch.halving import Move, Trial, next_move, ranking
from realsr_hpc.launch.proposals import Space, refuse_another_space
from realsr_hpc.launch.rundir import ALIVE, Queue, current_status, make_private, queue_of, run_folder
from realsr_hpc.launch.start import Submission
from realsr_hpc.launch.submit import submit_into, submit_patiently
from realsr_hpc.locks import hold
from realsr_hpc.tracking import compare_command, metrics_by_step, recipe_of

POLL_LOCAL_S = 1.0
POLL_SLURM_S = 5.0


@dataclass
class Sent:
    """One run in asha.json; `target` is updated when the run is promoted."""

    overrides: list[str]
    """The values of the sweep's axes in this run."""
    target: int
    """The rung, from 0, up to which it was last told to run."""


@dataclass
class Kept:
    """The content of asha.json, updated before each submission."""

    space: dict[str, list[str]]
    """`fixed` and `varied`: the sweep's overrides. Those that decide results are the same at every launch."""
    rungs: list[int]
    keep: int
    trials: list[Sent] = field(default_factory=list)


class Halving:
    """A sweep by asynchronous successive halving, in its folder."""

    def __init__(self, name: str, space: Space, console: Console) -> None:
        self.name, self.space, self.console = name, space, console
        self.root = output_root(space.sample)
        self.folder = make_private(make_private(self.root / "sweeps") / name)
        self.slurm = space.sample.cluster.kind == "slurm"
        self.configs: list[RunConfig] = []
        self.seen: list[Trial] = []
        self.interrupted: list[int] = []
        """Numbers of runs that ended before their rung under an earlier launch; they are resumed first."""
        self.refused: list[Submission] = []
        self.started = False
        """Whether Slurm has answered this launch once."""

    def run(self, *, follow: bool) -> int:
        """Run the sweep to its end; with follow=False submit what can start now. Returns 1 if sbatch refused a run."""
        with hold(self.folder / "asha.lock", f"sweep {self.name}"):
            self.kept = self._load()
            self.configs = compose_each([[*self.space.fixed, *sent.overrides] for sent in self.kept.trials])
            self.interrupted = self._look(range(len(self.configs)))
            try:
                while self._send() and follow and self._busy():
                    self._wait()
            except KeyboardInterrupt:
                self._say(
                    "stopped watching; the runs continue to their next rung. Launch the sweep again to continue it"
                )
                return 0
            self._report()
            return 1 if self.refused else 0

    def _load(self) -> Kept:
        wanted = Kept({"fixed": self.space.fixed, "varied": self.space.varied}, list(self.space.rungs), self.space.keep)
        kept = read_json(self.folder / "asha.json", Kept)
        if kept is None:
            return wanted
        refuse_another_space(self.name, kept.space, wanted.space)
        for name in ("rungs", "keep"):
            before, now = getattr(kept, name), getattr(wanted, name)
            if before != now:
                raise RecipeError(
                    f"sweep: {self.name}: was launched with {name} {before}, now {now}; choose another sweep="
                )
        self._keep_order(kept)
        return kept

    def _keep_order(self, kept: Kept) -> None:
        """Put the axes into the order of the first launch, in which the recorded overrides are compared."""
        order = [axis.key for axis in search_space(kept.space["varied"])[1]]
        axes = sorted(self.space.axes, key=lambda axis: order.index(axis.key))
        self.space = replace(self.space, axes=axes)
        kept.space = {"fixed": self.space.fixed, "varied": kept.space["varied"]}

    def _look(self, numbers: Sequence[int]) -> list[int]:
        """Read the state and results of these runs again; returns the numbers of those that ended before their rung."""
        queue, interrupted = self._queue(), []
        del self.seen[len(self.configs) :]
        for number in numbers:
            folder, target = run_folder(self.configs[number]), self.kept.trials[number].target
            status = current_status(folder, queue)
            values = self._values(folder, done=status is not None and status.state == "done")
            busy = status is not None and status.state in ALIVE
            trial = Trial(target if busy else max(target, len(values) - 1), values, busy)
            self.seen[number:] = [trial, *self.seen[number + 1 :]]
            if not busy and len(values) <= target:
                interrupted.append(number)
        return interrupted

    def _values(self, folder: Path, *, done: bool) -> tuple[float, ...]:
        """The metric at the rungs that a run has reached; NaN for a rung of a finished run without a value."""
        steps, values = metrics_by_step(folder), []
        for step in self.space.rungs:
            if step not in steps and not done:
                break
            values.append(steps.get(step, {}).get(self.space.metric, nan))
        return tuple(values)

    def _send(self) -> bool:
        """Fill the free slots, first with interrupted runs, then by halving's moves. False if one was refused."""
        moves = []
        while self.interrupted and self._free() > 0:
            number = self.interrupted.pop(0)
            self.seen[number] = replace(self.seen[number], busy=True)
            moves.append(Move(number, self.seen[number].target))
        while self._free() > 0 and (move := self._next()) is not None:
            moves.append(move)
        if not moves:
            return True
        for move in moves:
            self.kept.trials[move.trial or 0].target = move.rung
        write_atomically(self.folder / "asha.json", json.dumps(asdict(self.kept), indent=1))
        return self._submit(moves)

    def _next(self) -> Move | None:
        """The next move, already recorded in `seen` and `kept`; a new run gets its number."""
        space = self.space
        proposal = space.propose([sent.overrides for sent in self.kept.trials], self.seen)
        move = next_move(
            self.seen, len(space.rungs), space.keep, highest=space.highest, may_propose=proposal is not None
        )
        if move is None:
            return None
        if move.trial is None:
            assert proposal is not None, "halving proposes only where it may"
            self.kept.trials.append(Sent(proposal, 0))
            self.configs += compose_each([[*space.fixed, *proposal]])
            self.seen.append(Trial(0, busy=True))
            return Move(len(self.seen) - 1, 0)
        self.seen[move.trial] = replace(self.seen[move.trial], target=move.rung, busy=True)
        return move

    def _submit(self, moves: list[Move]) -> bool:
        folders = []
        for move in moves:
            number = move.trial or 0
            config, step = self.configs[number], self.space.rungs[move.rung]
            folder = run_folder(config)
            if runfolder.recipe(folder).exists():  # keeps, for example, the layout that it was last resumed with
                config = recipe_of(folder)
            stop = "null" if step == num_steps(config) else str(step)
            folders.append((override(config, [f"checkpoint.stop_at_step={stop}"]), folder))
            word = "new" if move.rung == 0 else "continue"
            self._say(f"{word:10}{folder.name}  {' '.join(self.kept.trials[number].overrides)}  to step {step}")
        if self.started:
            submissions = submit_patiently(folders, self._say, sweep=self.name, varied=self.space.keys)
        else:  # the first submission of a launch must fail at once, so that the user sees it
            submissions = submit_into(folders, sweep=self.name, varied=self.space.keys)
        self.started = True
        self.refused = [item for item in submissions if item.failed]
        for item in self.refused:
            self._say(f"REFUSED {item.run_dir.name}: {item.note}; launch the sweep again to continue")
        return not self.refused

    def _wait(self) -> None:
        """Wait until one of the busy runs has ended."""
        while True:
            queue = self._queue()
            left = [
                number
                for number in self._busy()
                if (status := current_status(run_folder(self.configs[number]), queue)) is None
                or status.state not in ALIVE
            ]
            if left:
                for number in self._look(left):
                    folder = run_folder(self.configs[number])
                    status = current_status(folder)
                    self._say(f"{status.state if status else 'lost':8}{folder.name}: not at its rung; left out for now")
                return
            time.sleep(POLL_SLURM_S if self.slurm else POLL_LOCAL_S)

    def _busy(self) -> list[int]:
        return [number for number, trial in enumerate(self.seen) if trial.busy]

    def _free(self) -> int:
        return self.space.sample.cluster.runs_at_once - len(self._busy())

    def _queue(self) -> Queue:
        return queue_of(run_folder(config) for config in self.configs)

    def _report(self) -> None:
        """Print the results of all runs, best first, and the share of the full sweep's steps that were computed."""
        rungs, table, used = self.space.rungs, Table("run", "varied", "state", box=None), 0
        for step in rungs:
            table.add_column(f"step {step}", justify="right")
        order: dict[int, None] = {}
        for rung in reversed(range(len(rungs))):
            order |= dict.fromkeys(ranking(self.seen, rung, highest=self.space.highest))
        for number in [*order, *(number for number in range(len(self.seen)) if number not in order)]:
            folder, values = run_folder(self.configs[number]), self.seen[number].values
            status = current_status(folder, self._queue())
            shown = [f"{value:.4f}" if isfinite(value) else "-" for value in values] + [""] * (len(rungs) - len(values))
            varied = " ".join(self.kept.trials[number].overrides)
            table.add_row(folder.name, varied, status.state if status else "", *shown)
            used += max(metrics_by_step(folder), default=0)
        self.console.print(table)
        whole = len(self.seen) * rungs[-1]
        self._say(f"{self.space.metric}: {used} of {whole} steps, {used / max(whole, 1):.0%} of all runs' whole length")
        self._say(f"compare: {compare_command(self.configs[0], self.name)}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
