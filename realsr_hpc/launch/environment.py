"""A node's rank and port within its job, and the environment variables of the ranks that it starts."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import python_path

FIRST_JOB_PORT = 20000
NUM_JOB_PORTS = 10000
LOOPBACK = Path("/sys/class/net/lo")


@dataclass(frozen=True)
class Placement:
    """A node's place in a job: its rank, the job's size, and the address where the ranks connect."""

    node_rank: int
    num_nodes: int
    tasks_per_node: int
    master_addr: str
    master_port: int
    job_id: str
    """As scontrol expects it: `1234` or `1234_5`; empty outside Slurm."""
    restarts: int
    """How often Slurm has requeued the job."""
    attempt: int = 0
    """How often the ranks were restarted inside the allocation."""

    @classmethod
    def find(cls, config: RunConfig, environment: Mapping[str, str]) -> Placement:
        """Read Slurm's variables; outside a Slurm step, a single node with a port reserved on this machine.

        ValueError if Slurm allocated another number of nodes than the recipe asks for.
        """
        tasks = config.cluster.tasks_per_node
        # A shell inside an allocation has SLURM_JOB_ID too; only a job step has SLURM_NODEID.
        if config.cluster.kind == "local" or "SLURM_NODEID" not in environment:
            return cls(0, 1, tasks, "127.0.0.1", reserved_port(), "", 0)
        num_nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment["SLURM_JOB_NUM_NODES"])
        if num_nodes != config.cluster.nodes:
            raise ValueError(
                f"cluster.nodes: {config.cluster.nodes}: Slurm gave {num_nodes}; ask sbatch for --nodes="
                f"{config.cluster.nodes}, or launch with cluster.nodes={num_nodes}"
            )
        restarts = int(environment.get("SLURM_RESTART_COUNT", 0))
        alone = num_nodes == 1
        return cls(
            node_rank=int(environment["SLURM_NODEID"]),
            num_nodes=num_nodes,
            tasks_per_node=tasks,
            master_addr="127.0.0.1" if alone else environment["SLURM_LAUNCH_NODE_IPADDR"],
            master_port=reserved_port() if alone else job_port(int(environment["SLURM_JOB_ID"]), restarts),
            job_id=slurm_job_id(environment),
            restarts=restarts,
        )

    def again(self) -> Placement:
        """The next attempt inside the same allocation, at another port."""
        port = reserved_port() if self.num_nodes == 1 else _after(self.master_port)
        return replace(self, attempt=self.attempt + 1, master_port=port)

    def rank_environment(self, config: RunConfig, local_rank: int) -> dict[str, str]:
        """Environment variables of one rank, for torch.distributed, OpenMP and Python."""
        return {
            "RANK": str(self.node_rank * self.tasks_per_node + local_rank),
            "WORLD_SIZE": str(self.num_nodes * self.tasks_per_node),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.tasks_per_node),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            **({"GLOO_SOCKET_IFNAME": "lo"} if self.num_nodes == 1 and LOOPBACK.exists() else {}),
            "OMP_NUM_THREADS": str(config.cluster.cpus_per_task),
            "THP_MEM_ALLOC_ENABLE": "1",  # torch's large tensors of the CPU lie in huge pages
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": python_path(),
        }

    def port_fault(self) -> str:
        """Why the ranks cannot connect to this node's port; empty if they can. The next attempt uses another port."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.master_addr, self.master_port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:  # not an address of this node (NAT): cannot be tested here
                    return ""
                return f"port {self.master_port} of node {os.uname().nodename}: {error.strerror}"
        return ""


def job_port(job_id: int, restarts: int) -> int:
    """A port that all nodes compute alike without communicating.

    Two jobs rarely get the same one, and a requeued job gets another one than before.
    """
    return FIRST_JOB_PORT + (7 * job_id + restarts) % NUM_JOB_PORTS


def _after(port: int) -> int:
    """The port of the next attempt, far from those of the next requeue and of the next job."""
    return FIRST_JOB_PORT + (port - FIRST_JOB_PORT + 3511) % NUM_JOB_PORTS


def slurm_job_id(environment: Mapping[str, str]) -> str:
    """`1234`, or `1234_5` for an array task: requeueing a task by its raw id would requeue another task."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment.get("SLURM_JOB_ID", "")


def reserved_port() -> int:
    """A port of the loopback interface that the system gives to no other process while this one runs.

    A socket stays bound to it without listening. Otherwise an outgoing connection of this node could take the port in
    the seconds until rank 0 listens on it. Rank 0 can still listen, because sockets that all set SO_REUSEADDR may share
    a bound port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    holder.detach()  # open until the process ends; children do not inherit it
    return port
