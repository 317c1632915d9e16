"""The place of one node's supervisor in its job, and the environment of the ranks it starts."""

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
    """One node of a job."""

    node_rank: int
    num_nodes: int
    tasks_per_node: int
    master_addr: str
    master_port: int
    job_id: str
    """As scontrol takes it: `1234` or `1234_5`; empty outside Slurm."""
    restarts: int
    """How often Slurm has requeued the job."""
    attempt: int = 0
    """How often its ranks were started again inside the allocation."""

    @classmethod
    def find(cls, config: RunConfig, environment: Mapping[str, str]) -> Placement:
        """From Slurm's variables, or one local node with a port reserved for it.

        ValueError when Slurm gave another number of nodes than the recipe's.
        """
        tasks = config.cluster.tasks_per_node
        # `bash` inside an allocation shows SLURM_JOB_ID too; only a step has a node id.
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
        """What torch.distributed, OpenMP and Python need to be told."""
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
        """Why the ranks cannot meet at this node's port, else nothing; the next attempt has another port."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.master_addr, self.master_port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:  # an address that a router translates: the store says so
                    return ""
                return f"port {self.master_port} of node {os.uname().nodename}: {error.strerror}"
        return ""


def job_port(job_id: int, restarts: int) -> int:
    """Known to all nodes without a word; two jobs rarely share it, and a requeued one has another than before."""
    return FIRST_JOB_PORT + (7 * job_id + restarts) % NUM_JOB_PORTS


def _after(port: int) -> int:
    """Far from the ports of the next requeue and of the next job."""
    return FIRST_JOB_PORT + (port - FIRST_JOB_PORT + 3511) % NUM_JOB_PORTS


def slurm_job_id(environment: Mapping[str, str]) -> str:
    """`1234`, or `1234_5` for a task of an array: requeueing the raw id of a task would move the wrong one."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment.get("SLURM_JOB_ID", "")


def reserved_port() -> int:
    """A port of the loopback that nobody else is given while this process lives, though rank 0 can listen on it.

    It is bound and stays so, without listening: a port that was only seen to be free went to any outgoing connection
    of the node in the seconds until rank 0 had started. Sockets that all set SO_REUSEADDR share a bound port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    holder.detach()  # open until the process ends; children do not inherit it
    return port
