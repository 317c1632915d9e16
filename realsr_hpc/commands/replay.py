"""Recompute a saved GRPO step: realsr-hpc replay run=RUN_DIR step=K [grpo.clip_high=0.3 ...].

Reports loss, gradient norm, ratios and the share of every reward in the advantages, from the weights before step K: the
checkpoint of step K - 1, or an earlier one with the saved steps in between (tracking.replay_every_steps saves them). On
the layout of the step every number is bitwise equal to the reported one; on another (parallel.tp=2) it agrees within a
stated tolerance.

  grpo.FIELD=VALUE                  fields that act after scoring: clip_low, clip_high, kl_beta, advantage, ...
  rewards.terms.NAME.weight=VALUE   another weight; 0: without this term
  parallel.FIELD=VALUE              another layout with as many processes; cluster.tasks_per_node=N for another number
  output=DIR                        default: RUN_DIR/replay/step-K/ and a name for the overrides
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_count, read_with_overrides
from realsr_hpc.config.derived import world_size
from realsr_hpc.paths import module_command, python_path

DEFAULTS = {"run": None, "step": None, "output": None}


def main(arguments: list[str]) -> int:
    """Exit code: 0 the numbers are the reported ones, 1 they are not, 2 nothing can be replayed."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__, sections_only=True)
        if not given["run"] or not given["step"]:
            raise ValueError("run=RUN_DIR and step=K are needed")
        number, run_dir = read_count(given, "step", 1), runfolder.find_run(Path("runs").resolve(), given["run"])
        from realsr_hpc.train import replay

        _, config, _ = replay.recipes(run_dir, number, overrides)
        replay.starting_point(run_dir, number)
        if "WORLD_SIZE" not in os.environ and world_size(config) > 1:
            return _spread(arguments, world_size(config))
        return _replay(run_dir, number, overrides, given["output"])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _replay(run_dir: Path, number: int, overrides: list[str], output: str | None) -> int:
    from realsr_hpc.train import replay_report
    from realsr_hpc.train.replay import replay

    replayed = replay(run_dir, number, overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        name = f"with-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:6]}" if overrides else "again"
        folder = Path(output) if output else runfolder.replay(run_dir, number) / name
        replay_report.write(replayed, overrides, folder)
        print(replay_report.table(replayed, overrides))
        print(f"{folder}: replay.md, replay.json, replay.png")
    return 1 if replayed.faults() else 0


def _spread(arguments: list[str], processes: int) -> int:
    """The same command on as many processes of this machine as the layout has."""
    spread = module_command("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python")
    here = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": python_path()}
    rank = module_command("realsr_hpc.commands", "replay", *arguments)
    return subprocess.run([*spread, *rank], env=here, check=False).returncode
