"""Save and load: Megatron's sharded state, each rank's random states and the run's own state, as one folder.

All ranks call `save` and `load` together. A checkpoint loads onto any tensor, pipeline and data-parallel layout;
random states return only onto the layout that wrote them.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from realsr_hpc.checkpoint import manifest
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.groups import Groups
from realsr_hpc.parallel.reduce import broadcast_object, gather_objects

logger = logging.getLogger(__name__)

_STATE = "state.json"
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class Optimiser(Protocol):
    """What is kept of an optimizer: Megatron's own, and the counters beside it."""

    vendor: Any
    distributed: bool
    num_updates: int
    num_skipped: int


def save(
    root: Path, step: int, policy: Policy, optimiser: Optimiser | None, state: dict[str, Any], keep_last: int
) -> Path:
    """Write the checkpoint of `step` under `root`, then drop all but the newest `keep_last`.

    state: what the run needs to go on, as JSON (data position, counters, MLflow run id). The folder appears under
    its name only when every byte of it is on disk and hashed.
    """
    groups, final, aside = policy.groups, manifest.folder_of(root, step), manifest.aside_of(root, step)
    if groups.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    _write_shards(aside, policy, optimiser)
    torch.save(_random_states(), aside / _random_file(groups.world_rank))
    if groups.is_main:
        own = {"run": state, "optimiser": None if optimiser is None else _counters(optimiser)}
        (aside / _STATE).write_text(json.dumps(own, indent=1))
    dist.barrier()
    files = _hash_together(aside, groups)
    if groups.is_main:
        manifest.complete(aside, final, files, {"step": step, "layout": _layout(groups, policy)})
        manifest.prune(root, keep_last)
    dist.barrier()
    return final


def resume_path(root: Path, groups: Groups) -> Path | None:
    """The newest whole checkpoint, the same answer on every rank (rank 0 reads and hashes)."""
    return broadcast_object(manifest.latest(root) if groups.is_main else None, dist.group.WORLD)


def load(path: Path, policy: Policy, optimiser: Optimiser | None, groups: Groups) -> dict[str, Any]:
    """Fill policy and optimizer from a checkpoint of any layout; returns the run's state given to `save`.

    optimiser None: weights only. ValueError when the folder is no complete checkpoint or has no optimizer state
    although one is wanted.
    """
    facts = manifest.read(path)
    own = json.loads((path / _STATE).read_text())
    if optimiser is not None and own["optimiser"] is None:
        raise ValueError(f"checkpoint {path} holds weights only: pass optimiser=None, or name a training checkpoint")
    with backend.vendor_calls():
        wanted = _sharded_state(policy, optimiser, loading=True)
        loaded = dist_checkpointing.load(wanted, str(path))
        _take_model(policy, loaded)
        if optimiser is not None:
            optimiser.vendor.load_state_dict(loaded["optimizer"])
    if optimiser is not None:
        optimiser.num_updates, optimiser.num_skipped = own["optimiser"]["updates"], own["optimiser"]["skipped"]
        _restore_random_states(path, facts, policy, groups)
    return own["run"]


def _write_shards(aside: Path, policy: Policy, optimiser: Optimiser | None) -> None:
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    with backend.vendor_calls():
        dist_checkpointing.save(_sharded_state(policy, optimiser, loading=False), str(aside), strategy)


def _sharded_state(policy: Policy, optimiser: Optimiser | None, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(policy)}
    if optimiser is not None:
        whole = dict(state) if len(policy.chunks) > 1 else state["model"]
        if loading:
            _give_empty_states(optimiser)
        state["optimizer"] = optimiser.vendor.sharded_state_dict(whole, is_loading=loading, metadata=_SHARDING)
    return state


def _named_chunks(policy: Policy) -> list[tuple[str, Any]]:
    if len(policy.chunks) == 1:
        return [("model", policy.chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(policy.chunks)]


def _give_empty_states(optimiser: Optimiser) -> None:
    """Torch's Adam has no states before its first update, and Megatron's sharded optimizer asserts that it has."""
    if optimiser.distributed:
        for vendor in getattr(optimiser.vendor, "chained_optimizers", [optimiser.vendor]):
            vendor._init_optimizer_states_with_dummy_values()


def _take_model(policy: Policy, loaded: dict[str, Any]) -> None:
    for name, chunk in _named_chunks(policy):
        chunk.load_state_dict(loaded[name])


def _counters(optimiser: Optimiser) -> dict[str, int]:
    return {"updates": optimiser.num_updates, "skipped": optimiser.num_skipped}


def _layout(groups: Groups, policy: Policy) -> dict[str, int]:
    sizes = {"tp": groups.tp_size, "pp": groups.pp_size, "dp": groups.dp_size}
    return sizes | {"virtual_pp": len(policy.chunks)}


def _hash_together(folder: Path, groups: Groups) -> dict[str, Any]:
    """Every rank flushes and hashes its share of the files; all shares together on every rank."""
    mine = manifest.content(folder)[groups.world_rank :: groups.world_size]
    shares = gather_objects(manifest.describe(folder, mine), dist.group.WORLD)
    return {name: facts for share in shares for name, facts in share.items()}


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_states(path: Path, facts: dict[str, Any], policy: Policy, groups: Groups) -> None:
    if facts["layout"] != _layout(groups, policy):
        logger.warning("checkpoint %s was written on %s: random states start anew", path, facts["layout"])
        return
    # our own file, its sha256 in the manifest; Python's and NumPy's states are no tensors
    states = torch.load(path / _random_file(groups.world_rank), map_location="cpu", weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])
