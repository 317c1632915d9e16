"""Sections of a recipe that say where a run executes, what it keeps and where it reports, not what it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from realsr_hpc.config.section import LAYOUT, Count, Positive, Section


class CheckpointConfig(Section, role="operation"):
    """Sharded, resumable checkpoints."""

    every_steps: Count = 10
    keep_last: Count = 2
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Checkpoints kept for their `best_metric`, beside the last ones; a new best one is saved when it is measured."""
    best_metric: str | None = None
    """None: heldout/total/mean (grpo), heldout/loss/mean (sft), heldout/psnr_db/mean (tokenizer)."""
    best_is: Literal["highest", "lowest"] | None = None
    """None: as the metric declares; given, it must agree."""
    async_save: bool = False
    """Files are written behind the next steps; costs a copy of the shards in host memory."""
    max_failed_in_a_row: Count = 3
    """So many checkpoints in a row that could not be written (a full disk) end the run; before, it trains on."""


class TrackingConfig(Section, role="operation"):
    """MLflow; events pass through a spool beside the checkpoint first."""

    uri: str | None = None
    """None: sqlite in the output root."""
    experiment: str = "realsr_hpc"
    description: str = ""
    tags: dict[str, str] = {}
    rollouts_every_steps: Annotated[int, Field(ge=0)] = 8
    """How often a few groups are kept whole for people to look at (tools/gallery.py); 0: never."""
    rollouts_groups: Count = 2
    """Groups kept each time, training and held-out ones."""


class ClusterConfig(Section, role="operation"):
    """Where a run executes."""

    kind: Literal["local", "slurm"] = "local"
    nodes: Annotated[Count, LAYOUT] = 1
    tasks_per_node: Annotated[Count, LAYOUT] = 1
    """One task a GPU (or CPU process): world size = nodes x tasks_per_node."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_task: Count = 1
    gpu_memory_gib: Positive | None = None
    memory_gib: Positive | None = None
    time_min: Count = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container_image: str | None = None
    extra_sbatch: dict[str, str | int] = {}
    environment_file: str | None = None
    array_parallelism: Count | None = None
    """Runs of a sweep that run at the same time; None: 16 on Slurm, one after the other on this machine."""
    signal_delay_s: Count = 120
    max_requeues: Annotated[int, Field(ge=0)] = 5
    """Requeues in a row without a new step; a run that gets on is requeued without limit."""
    hang_limit_s: Count = 1800
    """Longest time without a step; longer, and the job ends with its stacks in the logs and is requeued."""

    @property
    def runs_at_once(self) -> int:
        """Runs of a sweep that run at the same time."""
        return self.array_parallelism or (16 if self.kind == "slurm" else 1)
