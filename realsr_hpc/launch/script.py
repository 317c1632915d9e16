"""Translates a recipe's cluster section into submitit's Slurm parameters and the resulting batch script."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.operation import ClusterConfig
from realsr_hpc.config.places import output_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import SUMS_FILE
from realsr_hpc.launch.requeue import PATIENCE_S
from realsr_hpc.launch.rundir import run_folder
from realsr_hpc.paths import SAFE_PATH, resolve


def executor_parameters(
    cluster: ClusterConfig, job_name: str, setup: list[str], after: Sequence[str] = ()
) -> dict[str, object]:
    """submitit's Slurm parameters: one supervisor per node, which starts that node's tasks.

    after: ids of jobs that must succeed first. If one of them fails, Slurm removes this job from its queue.
    """
    waits = {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"} if after else {}
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
        "additional_parameters": {"requeue": True, **_extra(cluster), **waits},
        "setup": setup,
    }
    return {key: value for key, value in values.items() if value is not None}


def _extra(cluster: ClusterConfig) -> dict[str, bool | int | str]:
    """`cluster.extra_sbatch` with sbatch's spelling of the option names; submitit writes True as a bare option."""
    return {key.replace("_", "-"): value for key, value in cluster.extra_sbatch.items() if value is not False}


def _srun_arguments(cluster: ClusterConfig) -> list[str]:
    """A failing node ends the others; `cluster.container_image` needs enroot/pyxis on the cluster."""
    arguments = ["--kill-on-bad-exit=1"]
    if cluster.container_image:
        arguments.append(f"--container-image={cluster.container_image}")
    return arguments


def setup_lines(cluster: ClusterConfig, code: Path) -> list[str]:
    """Shell lines of the batch script before srun: source the site's file, verify the snapshot and change into it.

    A failing line ends the job, because outside its snapshot it would run other code. PYTHONSAFEPATH keeps Python from
    importing from the current folder, which a container may change. A supervisor that was killed (exit code 137, for
    instance by the out-of-memory killer) cannot requeue its job, so the script does it (`AGAIN`).
    """
    there, sums = shlex.quote(str(code)), f"sha256sum --check --quiet --strict {SUMS_FILE}"
    lines = [
        "set -eE -o pipefail",
        """trap 'echo "set-up of the job failed: $BASH_COMMAND" >&2' ERR""",
        f"cd {there}",
        f'{sums} || {{ echo "the snapshot of the code in $PWD is damaged; launch the run again" >&2; exit 1; }}',
        f'export PYTHONPATH={there}"${{PYTHONPATH:+:$PYTHONPATH}}" {SAFE_PATH}=1',
        "trap - ERR",
        *again_lines(cluster),
        "trap again EXIT",
    ]
    if cluster.environment_file:
        lines.insert(2, f"source {shlex.quote(str(resolve(cluster.environment_file)))}")
    return lines


def again_lines(cluster: ClusterConfig) -> list[str]:
    """Lines of the shell function `again`, for `trap again EXIT`: requeues the job of a killed supervisor."""
    return AGAIN.format(max_requeues=cluster.max_requeues, patience_s=int(PATIENCE_S)).strip().splitlines()


AGAIN = """
asked() {{
    local said pause=1 waited=0
    while ! said=$(scontrol "$@" 2>&1); do
        case $said in *"nable to contact"*|*"onnection refused"*) ;; *) break ;; esac
        [ $waited -lt {patience_s} ] || break
        sleep $pause
        waited=$((waited + pause)) pause=$((pause < 30 ? 2 * pause : 60))
    done
    echo "$said"
}}
again() {{
    local code=$? id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
    id=${{id:-$SLURM_JOB_ID}}
    case $code in 134|135|137|139) ;; *) return 0 ;; esac
    [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ] || return 0
    case $(asked show job --oneliner "$id") in *" JobState=RUNNING "*) ;; *) return 0 ;; esac
    echo "the run's supervisor was killed (code $code): requeueing $id" >&2
    asked requeue "$id" >&2
}}
"""
"""Shell function that requeues the job, retrying for minutes while the controller does not answer.

It does nothing for a job that is being cancelled or is already requeued."""


def sbatch_script(config: RunConfig, num_runs: int = 1) -> str:
    """The batch script that would be submitted; with `num_runs` > 1 that of one array of so many runs."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = runfolder.job_logs(run_folder(config))
    setup = setup_lines(config.cluster, output_root(config) / "code" / "SNAPSHOT")
    return _make_sbatch_string(
        command=f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}",
        folder=folder,
        map_count=num_runs if num_runs > 1 else None,
        **executor_parameters(config.cluster, config.name, setup),  # type: ignore[arg-type]
    )
