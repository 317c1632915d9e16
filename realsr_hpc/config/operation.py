"""Sections of a recipe about execution, checkpoints and tracking; they do not affect what a run learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from realsr_hpc.config.section import LAYOUT, Count, Positive, Section


class CheckpointConfig(Section, role="operation"):
    """Sharded, resumable checkpoints."""

    every_steps: Count = 10
    """Steps between checkpoints; one is also saved when a run is stopped and at its end."""
    keep_last: Count = 2
    """Number of newest checkpoints that are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of best checkpoints by `best_metric` that are kept besides the newest; a new best one is saved as soon as
    it is measured."""
    best_metric: str | None = None
    """Metric by which the best checkpoints are chosen; None: heldout/total/mean (grpo), heldout/loss/mean (sft),
    heldout/psnr_db/mean (tokenizer)."""
    best_is: Literal["highest", "lowest"] | None = None
    """Direction of `best_metric`; None: the metric's own, with which a given value must agree."""
    async_save: bool = False
    """Write files while the next steps run; needs a copy of the shards in host memory."""
    stop_at_step: Count | None = None
    """Stop after this step with a checkpoint, to be resumed later; None: run to the last step."""
    max_failed_in_a_row: Count = 3
    """Fail the run after this many consecutive checkpoints that could not be written (a full disk)."""


class TrackingConfig(Section, role="operation"):
    """MLflow. Events are first written to a file in the run's folder and then delivered."""

    uri: str | None = None
    """MLflow tracking URI; None: an SQLite file in the output root."""
    experiment: Annotated[str, Field(min_length=1)] = "realsr_hpc"
    """MLflow experiment that the runs belong to."""
    description: str = ""
    """Free text for the run's page in MLflow."""
    tags: dict[str, str] = {}
    """Tags of the run in MLflow."""
    rollouts_every_steps: Annotated[int, Field(ge=0)] = 8
    """Steps between savings of a few groups for inspection (realsr-hpc gallery); 0: never."""
    rollouts_groups: Count = 2
    """Number of groups saved each time, of training and of held-out images each."""
    notify: Annotated[str, Field(min_length=1)] | None = None
    """Shell command that reads one line of JSON when the run starts, is requeued, stops, fails or ends."""
    replay_every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between GRPO steps that are recorded completely for replay (realsr-hpc replay); 0: never."""


class ClusterConfig(Section, role="operation"):
    """Where a run executes."""

    kind: Literal["local", "slurm"] = "local"
    """Where the run executes: this machine, or Slurm."""
    nodes: Annotated[Count, LAYOUT] = 1
    """Number of nodes."""
    tasks_per_node: Annotated[Count, LAYOUT] = 1
    """One task per GPU (or CPU process): world size = nodes x tasks_per_node."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs that a run uses on each node; 0: it computes on CPUs."""
    cpus_per_task: Count = 1
    """CPU cores for each process."""
    gpu_memory_gib: Positive | None = None
    """Memory of one GPU; a plan that needs more is refused. None: not checked."""
    memory_gib: Positive | None = None
    """Host memory per node to request from Slurm; None: the site's default."""
    time_min: Count = 60
    """Time limit of a job in minutes; a longer run continues in the next job."""
    partition: str | None = None
    """Slurm partition; None: the site's default. Several: `a,b`."""
    account: str | None = None
    """Slurm account to charge; None: your default account."""
    qos: str | None = None
    """Slurm quality of service."""
    constraint: str | None = None
    """Slurm node features, such as `h100`."""
    container_image: str | None = None
    """Container image that ranks run in (enroot/pyxis); None: no container."""
    extra_sbatch: dict[str, bool | int | str] = {}
    """Further sbatch options by name, such as `{exclusive: true, reservation: NAME}`; false omits one."""
    environment_file: str | None = None
    """Shell file that each job sources first: modules, proxies, secrets."""
    array_parallelism: Count | None = None
    """Runs of a sweep that run at the same time; None: 16 on Slurm, one after the other on this machine."""
    signal_delay_s: Count = 120
    """Seconds before the time limit at which the job gets the signal to save and requeue."""
    max_requeues: Annotated[int, Field(ge=0)] = 5
    """Requeues in a row without a new step; a run that makes progress is requeued without limit."""
    restarts_in_place: Annotated[int, Field(ge=0)] = 1
    """Restarts of killed ranks inside the allocation, in a row without a new step, before the job is requeued."""
    hang_limit_s: Count = 1800
    """Longest time without a completed step; then the job logs its stack traces, ends and is requeued."""

    @property
    def runs_at_once(self) -> int:
        """Runs of a sweep that run at the same time."""
        return self.array_parallelism or (16 if self.kind == "slurm" else 1)
