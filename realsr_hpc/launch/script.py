"""What a recipe's cluster section means to Slurm: submitit's parameters and the batch script they make."""

from __future__ import annotations

import sys
from pathlib import Path

from realsr_hpc.config.load import output_root
from realsr_hpc.config.operation import ClusterConfig
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.rundir import run_folder
from realsr_hpc.paths import project_root


def executor_parameters(cluster: ClusterConfig, job_name: str, setup: list[str]) -> dict[str, object]:
    """submitit's Slurm parameters: one supervisor a node, which starts that node's tasks."""
    values: dict[str, object | None] = {
        "job_name": job_name,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_task * cluster.tasks_per_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{int(cluster.memory_gib * 1024)}M" if cluster.memory_gib else None,
        "time": cluster.time_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "signal_delay_s": cluster.signal_delay_s,
        "array_parallelism": cluster.runs_at_once,
        "srun_args": _srun_arguments(cluster),
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **cluster.extra_sbatch},
        "setup": setup,
    }
    return {key: value for key, value in values.items() if value is not None}


def _srun_arguments(cluster: ClusterConfig) -> list[str]:
    """One node that fails ends the others; a container where the site has enroot/pyxis."""
    arguments = ["--kill-on-bad-exit=1"]
    if cluster.container_image:
        arguments.append(f"--container-image={cluster.container_image}")
    return arguments


def setup_lines(cluster: ClusterConfig, code: Path) -> list[str]:
    """Shell lines of the batch script before srun; into the snapshot, as Python looks in the current folder first."""
    lines = [f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}", f"cd {code}"]
    if cluster.environment_file:
        lines.insert(0, f"source {(project_root() / cluster.environment_file).resolve()}")
    return lines


def sbatch_script(config: RunConfig, num_runs: int = 1) -> str:
    """The script that would be submitted, `map_count` runs as one array."""
    from submitit.slurm.slurm import _make_sbatch_string

    run_dir = run_folder(config)
    setup = setup_lines(config.cluster, output_root(config) / "code" / "SNAPSHOT")
    return _make_sbatch_string(
        command=f"{sys.executable} -u -m submitit.core._submit {run_dir / 'logs' / 'job'}",
        folder=run_dir / "logs" / "job",
        map_count=num_runs if num_runs > 1 else None,
        **executor_parameters(config.cluster, config.name, setup),  # type: ignore[arg-type]
    )
