"""This process's groups, their sizes and its ranks. They are created once and passed as arguments."""

from __future__ import annotations

import errno
import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.layout import layout_of

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

COLLECTIVE_TIMEOUT_MIN = 30
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessGroups:
    """Tensor (tp), pipeline (pp) and data (dp) groups of this process, with their sizes and its rank in each."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    replica: dist.ProcessGroup
    """The ranks that hold one copy of the policy together: tp x pp."""
    replica_rank: int
    replica_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    world_rank: int
    world_size: int
    device: torch.device
    pg_collection: ProcessGroupCollection
    """Megatron's own bundle of the same groups."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this is world rank 0, which writes files and logs."""
        return self.world_rank == 0


def initialise(parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Connect to the other processes and build the groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; without them this is the only process. A second call
    with the same layout returns the same groups, one with another layout builds new groups. ValueError if tp x pp does
    not divide the number of processes, or if there are several and no address is set.
    """
    backend.prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend.set_device(local_rank)
    layout = layout_of(parallel, int(os.environ.get("WORLD_SIZE", "1")))
    if not dist.is_initialized():
        _join(layout.world_size)
    # Megatron creates its groups in module state; we read them once and pass them as arguments from then on
    with backend.vendor_calls():
        if parallel_state.model_parallel_is_initialized() and not _same_layout(parallel):
            parallel_state.destroy_model_parallel()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                parallel.tp,
                parallel.pp,
                virtual_pipeline_model_parallel_size=parallel.virtual_pp if parallel.virtual_pp > 1 else None,
            )
        model_parallel_cuda_manual_seed(seed)
    return _groups(backend.device(local_rank))


def shutdown() -> None:
    """Destroy all groups; `initialise` may be called again."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(world_size: int) -> None:
    timeout = timedelta(minutes=COLLECTIVE_TIMEOUT_MIN)
    if world_size == 1:
        dist.init_process_group(backend.dist_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE = {world_size} but {', '.join(missing)} not set: start through launch or torchrun"
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun holds the store itself
        dist.init_process_group(backend.dist_backend(), timeout=timeout)
        return
    rank = int(os.environ["RANK"])
    store = rendezvous_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, world_size, timeout)
    dist.init_process_group(backend.dist_backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)


def rendezvous_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:  # pyright: ignore[reportPrivateImportUsage]
    """The TCP store through which ranks connect; it listens only on `address`, on a single node the loopback address.

    Torch's default listens on every address of the node, and any client can write to it.
    """
    if rank:
        return dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    try:
        listener = socket.create_server((address, port), backlog=world_size)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        logger.warning("%s is not an address of this node (behind NAT?): the store listens on every address", address)
        listener = socket.create_server(("", port), backlog=world_size)
    return dist.TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())  # pyright: ignore[reportPrivateImportUsage]


def _same_layout(parallel: ParallelConfig) -> bool:
    from megatron.core import parallel_state

    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    return (
        parallel_state.get_tensor_model_parallel_world_size() == parallel.tp
        and parallel_state.get_pipeline_model_parallel_world_size() == parallel.pp
        and virtual == parallel.virtual_pp
    )


def _groups(device: torch.device) -> ProcessGroups:
    from megatron.core.process_groups_config import ProcessGroupCollection

    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ProcessGroups(
        tp=collection.tp,
        pp=collection.pp,
        dp=collection.dp,
        replica=collection.mp,
        replica_rank=collection.mp.rank(),
        replica_size=collection.mp.size(),
        tp_rank=collection.tp.rank(),
        tp_size=collection.tp.size(),
        pp_rank=collection.pp.rank(),
        pp_size=collection.pp.size(),
        dp_rank=collection.dp.rank(),
        dp_size=collection.dp.size(),
        world_rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        pg_collection=collection,
    )
