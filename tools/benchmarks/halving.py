"""Successive halving of 27 tiny runs beside all 27 to their end: its share of the steps, and whether it finds the best.

    python tools/bench.py halving output=DIR [kind=slurm] [at_once=3] [cluster.partition=gpu ...]

About 60 starts of a process that trains for up to 27 steps: half an hour on two cores. Started again with the same
output it goes on. Exit code 1 where halving misses the best, takes more than 40 % of the steps, or a number of a run
that it paused differs from the undisturbed run's.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from realsr_hpc.commands.launch import main as launch
from realsr_hpc.config.arguments import read_choice, read_count, read_with_overrides
from realsr_hpc.config.load import from_yaml, written
from realsr_hpc.launch.rundir import ALIVE, current_status
from realsr_hpc.runfolder import list_runs, recipe
from realsr_hpc.tracking import metrics_by_step

RATES = [f"{10 ** (-6 + place / 5):.3g}" for place in range(27)]
METRIC = "heldout/loss/mean"
MOST = 0.4
"""Share of the full sweep's steps that halving may take."""
NARROW = """recipe=sft_tiny data.manifest=recipes/assets/photographs/manifest.parquet cluster.tasks_per_node=1
cluster.cpus_per_task=1 vlcot.image_sizes_px=[32,64,96] vlcot.lq_size_px=32 vlcot.max_text_tokens=6
vlcot.text_slots=null model.weights=null model.num_layers=2 model.hidden_size=64 model.ffn_hidden_size=96
sft.batch_size=2 sft.num_steps=27 sft.heldout_every_steps=3 sft.heldout_traces=4 sft.sample_every_steps=0
optim.warmup_steps=0 optim.min_lr=0 optim.schedule=constant checkpoint.every_steps=100 checkpoint.keep_last=1
sweep=rates""".split()
TIMES = ("time/", "system/")
"""Metrics that tell of the machine."""
Sweep = dict[float, dict[int, dict[str, float]]]
"""Metrics by learning rate and step."""


def main(arguments: list[str]) -> int:
    """Run both sweeps and print what became of them."""
    defaults = {"output": "runs/halving", "kind": "local", "at_once": "3"}
    given, overrides = read_with_overrides(arguments, defaults, __doc__, sections_only=True)
    kind, at_once = read_choice(given, "kind", ("local", "slurm")), read_count(given, "at_once", 1)
    words = [*NARROW, f"optim.lr={','.join(RATES)}", f"cluster.kind={kind}", f"cluster.array_parallelism={at_once}"]
    words += overrides
    found = {}
    for name, options in {"halved": ["sampler=asha", "rungs=3,9"], "all": []}.items():
        root = Path(given["output"]).resolve() / name
        if launch(["-m", *words, f"output_root={written(str(root))}", *options]):
            return 1
        found[name] = wait_for(root)
    return told(found["halved"], found["all"])


def wait_for(root: Path) -> Sweep:
    """What the runs of a root have measured when none is left alive."""
    runs = list_runs(root)
    while any(status is None or status.state in ALIVE for status in map(current_status, runs)):
        time.sleep(2.0)
    return {from_yaml(recipe(run)).optim.lr: metrics_by_step(run) for run in runs}


def told(halved: Sweep, whole: Sweep) -> int:
    """Print shares and the best of both; exit code 1 where they are not as they must be."""
    steps = {name: sum(max(run, default=0) for run in sweep.values()) for name, sweep in (("h", halved), ("w", whole))}
    share, faults = steps["h"] / steps["w"], []
    best = {name: min(sweep, key=lambda lr: final(sweep[lr])) for name, sweep in (("h", halved), ("w", whole))}
    print(f"steps: {steps['h']} of {steps['w']}, {share:.0%}; best learning rate: {best['h']:g}, of all {best['w']:g}")
    if share > MOST:
        faults.append(f"more than {MOST:.0%} of the steps")
    if best["h"] != best["w"]:
        faults.append("the best of all was missed")
    for lr, run in halved.items():
        if any(of_training(run[step]) != of_training(whole[lr].get(step, {})) for step in run):
            faults.append(f"optim.lr={lr:g}: other numbers than those of the run that was never paused")
    print("\n".join(faults) or "every number of the paused runs is the undisturbed run's, bit for bit")
    return 1 if faults else 0


def final(run: dict[int, dict[str, float]]) -> float:
    """The loss at the last step of all; infinite where the run was paused before."""
    loss = run.get(27, {}).get(METRIC, math.inf)
    return loss if math.isfinite(loss) else math.inf


def of_training(metrics: dict[str, float]) -> dict[str, float]:
    """Without what the machine has to do with."""
    return {name: value for name, value in metrics.items() if not name.startswith(TIMES) and "per_s" not in name}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
