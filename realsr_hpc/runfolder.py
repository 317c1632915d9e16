"""Defines every path inside a run's folder, and finds a run by its name.

OUTPUT_ROOT/<name>-<signature>/
    recipe.yaml  plan.txt  environment.json  tags.json  place.json      the launcher, once
    again.sh                                                            prepare, for a user's own batch file
    code                                                                link to the snapshot of the code (Slurm)
    job.json  status.json  requeues.json  notified.json  run.lock       launch
    progress.json  events.jsonl  delivered.json  mlflow.json            tracking
    results.jsonl  results_sent.json                                    tracking, for evaluations
    checkpoints/step-N/  checkpoints/best                               checkpoint
    logs/rank-N.log  logs/controller.log  logs/job/  logs/verdicts/     launch
    rollouts/step-N-KIND/  evaluation/step-N/                           artifacts, for inspection
    replay/step-N/  skipped/  samples/                                  train
    image_tokenizer.safetensors  text_tokenizer.json                    train, task tokenizer
    checkpoint.pt  grid_N.png                                           train, task tokenizer
    demo/  export/                                                      commands.demo

This module has paths only; the module that writes and reads a file defines its content.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

STEP = "step-"
"""Beginning of every folder that belongs to a step."""
RECIPE = "recipe.yaml"
BEST = "best"
_Run = TypeVar("_Run")


def recipe(run_dir: Path) -> Path:
    """recipe.yaml: the resolved recipe; a folder with this file is a run folder."""
    return run_dir / RECIPE


def plan(run_dir: Path) -> Path:
    """plan.txt: the plan that the launcher printed."""
    return run_dir / "plan.txt"


def environment(run_dir: Path) -> Path:
    """Versions of the installed packages."""
    return run_dir / "environment.json"


def launch_tags(run_dir: Path) -> Path:
    """MLflow tags that are known only when launching."""
    return run_dir / "tags.json"


def again(run_dir: Path) -> Path:
    """Shell function that requeues a job whose supervisor was killed, for a batch file to source."""
    return run_dir / "again.sh"


def place(run_dir: Path) -> Path:
    """Where the run was launched."""
    return run_dir / "place.json"


def code(run_dir: Path) -> Path:
    """Link to the snapshot of the code that the run executes."""
    return run_dir / "code"


def job(run_dir: Path) -> Path:
    """job.json: the job that runs the folder (`launch.rundir.Job`)."""
    return run_dir / "job.json"


def status(run_dir: Path) -> Path:
    """status.json: state, exit code and message (`launch.rundir.Status`)."""
    return run_dir / "status.json"


def requeues(run_dir: Path) -> Path:
    """Requeues since the last new step."""
    return run_dir / "requeues.json"


def notified(run_dir: Path) -> Path:
    """Counts of delivered and failed notifications (`tracking.notify`)."""
    return run_dir / "notified.json"


def lock(run_dir: Path) -> Path:
    """Lock that the supervisor of the run's first node holds, so that two jobs never run one folder."""
    return run_dir / "run.lock"


def progress(run_dir: Path) -> Path:
    """progress.json: the last completed step."""
    return run_dir / "progress.json"


def events(run_dir: Path) -> Path:
    """events.jsonl: all metrics and artifacts, append-only."""
    return run_dir / "events.jsonl"


def delivered(run_dir: Path) -> Path:
    """delivered.json: byte offset in events.jsonl up to which MLflow has the events."""
    return run_dir / "delivered.json"


def results(run_dir: Path) -> Path:
    """results.jsonl: metrics and files of the run's evaluations, append-only."""
    return run_dir / "results.jsonl"


def results_sent(run_dir: Path) -> Path:
    """results_sent.json: position in results.jsonl up to which MLflow has the results."""
    return run_dir / "results_sent.json"


def results_lock(run_dir: Path) -> Path:
    """Lock held while results are written or sent, because evaluations may run at the same time."""
    return run_dir / "results.lock"


def mlflow(run_dir: Path) -> Path:
    """mlflow.json: store and id of the run's MLflow run."""
    return run_dir / "mlflow.json"


def mlflow_lock(run_dir: Path) -> Path:
    """Lock held while the MLflow run is found or created."""
    return run_dir / "mlflow.lock"


def checkpoints(run_dir: Path) -> Path:
    """Folder of the checkpoints."""
    return run_dir / "checkpoints"


def best_checkpoint(run_dir: Path) -> Path:
    """Link to the best checkpoint, if `checkpoint.keep_best` is set."""
    return checkpoints(run_dir) / BEST


def tokenizer_files(run_dir: Path) -> dict[str, Path]:
    """Tokenizers that a run of task `tokenizer` writes, by the recipe field that uses them."""
    return {
        "image_tokenizer.weights": run_dir / "image_tokenizer.safetensors",
        "text_tokenizer.path": run_dir / "text_tokenizer.json",
    }


def tokenizer_checkpoint(run_dir: Path) -> Path:
    """From which a run of task `tokenizer` continues."""
    return run_dir / "checkpoint.pt"


def reconstructions(run_dir: Path, step: int) -> Path:
    """Held-out images as the tokenizer of a run of task `tokenizer` reconstructs them after a step."""
    return run_dir / f"grid_{step:06d}.png"


def demo(run_dir: Path) -> Path:
    """Folder of the demo's evaluation, restored image and gallery."""
    return run_dir / "demo"


def demo_export(run_dir: Path) -> Path:
    """The demo's export."""
    return run_dir / "export"


def run_of_checkpoint(checkpoint: Path) -> Path:
    """The run folder that RUN_DIR/checkpoints/step-N belongs to."""
    return checkpoint.parent.parent


def is_checkpoint(folder: Path) -> bool:
    """Whether a path has the form of a run's checkpoint, RUN_DIR/checkpoints/step-N; it need not exist."""
    return folder.parent.name == "checkpoints"


def logs(run_dir: Path) -> Path:
    """Folder of the logs."""
    return run_dir / "logs"


def rank_log(run_dir: Path, rank: int) -> Path:
    """Output of a rank, of all attempts in order."""
    return logs(run_dir) / f"rank-{rank}.log"


def job_logs(run_dir: Path) -> Path:
    """submitit's folder: the supervisor's own output."""
    return logs(run_dir) / "job"


def controller_log(run_dir: Path) -> Path:
    """Output of the process that starts a local job."""
    return logs(run_dir) / "controller.log"


def notify_log(run_dir: Path) -> Path:
    """Output of the recipe's `tracking.notify` command."""
    return logs(run_dir) / "notify.log"


def verdicts(run_dir: Path) -> Path:
    """Folder in which the nodes of an attempt record how it ended for them."""
    return logs(run_dir) / "verdicts"


def exclude_lock(run_dir: Path) -> Path:
    """Lock held while a node adds unhealthy nodes to the job's list of excluded nodes."""
    return logs(run_dir) / "exclude.lock"


def skipped(run_dir: Path) -> Path:
    """Folder with the batches of skipped updates."""
    return run_dir / "skipped"


def samples(run_dir: Path, step: int) -> Path:
    """Held-out images that the policy restored after a step of SFT."""
    return run_dir / "samples" / f"{step_name(step)}.png"


def rollouts(run_dir: Path, step: int, kind: str) -> Path:
    """Folder of the groups that training stored at one step, for the gallery; kind: train or heldout."""
    return run_dir / "rollouts" / f"{step_name(step)}-{kind}"


def all_rollouts(run_dir: Path, kind: str = "*") -> list[Path]:
    """All folders of stored groups, oldest step first."""
    return sorted((run_dir / "rollouts").glob(f"{STEP}*-{kind}"))


def evaluations(run_dir: Path) -> Path:
    """Folder of the evaluations: step-N/ for the held-out images, step-N/SET/ for a test set."""
    return run_dir / "evaluation"


def replay(run_dir: Path, step: int) -> Path:
    """Folder of one step that was stored for replaying."""
    return run_dir / "replay" / step_name(step)


def replay_steps(run_dir: Path) -> list[int]:
    """Steps that were stored for replaying, in order."""
    return sorted(step_of(path) for path in (run_dir / "replay").glob(f"{STEP}*") if is_step(path))


def step_name(step: int) -> str:
    """`step-000010`: names sort like steps, up to a million."""
    return f"{STEP}{step:06d}"


def is_step(folder: Path) -> bool:
    """Whether a folder has a name of the form of `step_name`."""
    number = folder.name.removeprefix(STEP)
    return number != folder.name and number.isdecimal()


def step_of(folder: Path) -> int:
    """The step in a folder's name."""
    return int(folder.name.removeprefix(STEP))


def usual_root() -> Path:
    """The output root of commands that are not given one: `runs` in the current folder."""
    return Path("runs").resolve()


def list_runs(root: Path) -> list[Path]:
    """Run folders of an output root, oldest first, without those that cannot be read. OSError if the root cannot."""
    if root.is_dir():
        os.scandir(root).close()  # raises OSError, where glob would silently find nothing
    found = {path.parent: path.stat().st_mtime for path in root.glob(f"*/{RECIPE}") if path.is_file()}
    return sorted(found, key=lambda path: found[path])


def named(runs: Sequence[_Run], name: str, names_of: Callable[[_Run], Sequence[str]]) -> list[_Run]:
    """The runs with this name, or, if there are none, those whose first name begins with it."""
    return [run for run in runs if name in names_of(run)] or [run for run in runs if names_of(run)[0].startswith(name)]


def find_run(root: Path, name: str) -> Path:
    """The run with this folder name, unique prefix or path. ValueError names the candidates."""
    if recipe(Path(name)).exists():
        return Path(name).resolve()
    runs = list_runs(root)
    found = named(runs, name, lambda run: (run.name,))
    if len(found) == 1:
        return found[0]
    names = ", ".join(run.name for run in (found or runs)) or "none"
    why = "several names begin with it" if found else f"no {RECIPE} at this path, and no run of this name"
    raise ValueError(f"run {name!r}: {why} in {root}; available: {names}")
