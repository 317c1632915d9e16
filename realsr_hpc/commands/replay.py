"""Recompute a saved GRPO step: realsr-hpc replay run=RUN_DIR step=K [grpo.clip_high=0.3 ...].

Reports loss, gradient norm, ratios and the share of every reward in the advantages, from the weights before step K: the
checkpoint of step K - 1, or an earlier one with the saved steps in between (tracking.replay_every_steps saves them). On
the layout of the step every number is bitwise equal to the reported one; on another (parallel.tp=2) it agrees within a
stated tolerance.

  grpo.FIELD=VALUE                  fields that act after scoring: clip_low, clip_high, kl_beta, advantage, ...
  rewards.terms.NAME.weight=VALUE   another weight; 0: without this term
  grpo.mismatch_kl_gate=null        compare although sampler and policy differ by more than the gate allows
  parallel.FIELD=VALUE              another layout with as many processes; cluster.tasks_per_node=N for another number
  output=DIR                        default: RUN_DIR/replay/step-K/ and a name for the overrides
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_count, read_with_overrides
from realsr_hpc.config.derived import world_size
from realsr_hpc.paths import module_command, python_path

DEFAULTS = {"run": None, "step": None, "output": None}
CODE_FILE = "REALSR_HPC_REPLAY_CODE"
"""Environment variable with the path of a file for rank 0's exit code. The ranks themselves exit with 0, because
torchrun prints a long report about a rank that does not."""
OTHER_RANKS_WAIT_S = 5
"""How long other ranks wait before they print an error, which rank 0 has most likely printed already."""


def main(arguments: list[str]) -> int:
    """Returns 0 if the numbers equal the reported ones, 1 if not, 2 if the step cannot be replayed."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__, sections_only=True)
        if not given["run"] or not given["step"]:
            raise ValueError("run=RUN_DIR and step=K are needed")
        number, run_dir = read_count(given, "step", 1), runfolder.find_run(runfolder.usual_root(), given["run"])
        from realsr_hpc.train import replay

        _, config, _ = replay.recipes(run_dir, number, overrides)
        replay.starting_point(run_dir, number)
        if "WORLD_SIZE" not in os.environ and world_size(config) > 1:
            return _spread(arguments, world_size(config))
        return _replay(run_dir, number, overrides, given["output"])
    except ValueError as error:
        return _refused(str(error))


def _refused(message: str) -> int:
    """Print an error: on rank 0, and on other ranks only if rank 0 had none."""
    if _rank() and CODE_FILE in os.environ:
        time.sleep(OTHER_RANKS_WAIT_S)
        if Path(os.environ[CODE_FILE]).read_text(encoding="utf-8"):
            return 0
    print(message, file=sys.stderr)
    return _ended(2)


def _ended(code: int) -> int:
    """The exit code of this process, after rank 0 has stored `code` as that of the command."""
    if CODE_FILE in os.environ and not _rank():
        Path(os.environ[CODE_FILE]).write_text(str(code), encoding="utf-8")
        return 0
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _replay(run_dir: Path, number: int, overrides: list[str], output: str | None) -> int:
    from realsr_hpc.train import replay_report
    from realsr_hpc.train.objective import InexactStep
    from realsr_hpc.train.replay import GATE, replay

    try:
        replayed = replay(run_dir, number, overrides)
    except InexactStep as error:
        remedy = f"{GATE}=null compares its numbers all the same" if error.gate else "replay on its own layout"
        raise ValueError(f"replay of {error}; {remedy}") from None
    if _rank():
        return 0
    name = f"with-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:6]}" if overrides else "again"
    folder = Path(output) if output else runfolder.replay(run_dir, number) / name
    replay_report.write(replayed, overrides, folder)
    print(replay_report.table(replayed, overrides))
    print(f"{folder}: replay.md, replay.json, replay.png")
    return _ended(1 if replayed.faults() else 0)


def _spread(arguments: list[str], processes: int) -> int:
    """Run the same command in as many processes on this machine as the layout needs."""
    spread = module_command("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python")
    rank = module_command("realsr_hpc.commands", "replay", *arguments)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as code:
        here = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": python_path(), CODE_FILE: code.name}
        ended = subprocess.run([*spread, *rank], env=here, check=False).returncode
        return ended or int(code.read() or 2)
