"""Loads checkpoints: Megatron's sharded state, each rank's random states, the run's own state.

All ranks call `load` together. A checkpoint loads onto any tensor, pipeline and data-parallel layout; random states are
restored only on the layout that wrote them. Training does not use these states, because rollouts and degradations draw
from generators keyed by seed and sample on every layout. They are saved for extensions that do.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict  # Any: Megatron's sharded states, modules and optimizers have no types

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from realsr_hpc.checkpoint import integrity
from realsr_hpc.checkpoint.pickles import refuse_code
from realsr_hpc.files import parse_json
from realsr_hpc.model import lora
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.process_groups import ProcessGroups
from realsr_hpc.parallel.reduce import broadcast_object, gather_objects

logger = logging.getLogger(__name__)

STATE = "state.json"
_EXTRA_STATE = "_extra_state"
"""Torch's key for a module's state other than tensors; Transformer Engine's modules keep delayed FP8's scales there."""
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
"""They count updates in the state of each parameter; Transformer Engine's Adam counts them elsewhere."""


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on, beside weights, optimizer and random states."""

    step: int
    """Steps done."""
    data: dict[str, bool | int | str] = field(default_factory=dict[str, bool | int | str])
    """The loader's position, and what it belongs to."""
    counters: dict[str, int] = field(default_factory=dict[str, int])
    run_id: str | None = None
    """MLflow's."""


@dataclass(frozen=True)
class Counters:
    """The counters that the learning-rate schedule depends on."""

    updates: int
    skipped: int


@dataclass(frozen=True)
class Stored:
    """The content of state.json."""

    run: RunState
    optimiser: Counters | None
    """None: the checkpoint holds weights only."""


class RandomStates(TypedDict):
    """Every generator of a process, as tensors, numbers and tuples: what `weights_only` loading takes."""

    python: tuple[object, ...]
    numpy: tuple[str, torch.Tensor, int, int, float]
    torch: torch.Tensor
    cuda: torch.Tensor
    megatron: dict[str, torch.Tensor]


class Optimiser(Protocol):
    """The optimizer as checkpoints see it: Megatron's own and our counters."""

    vendor: Any
    distributed: bool
    num_updates: int
    num_skipped: int


def resume_path(root: Path, groups: ProcessGroups) -> Path | None:
    """The newest undamaged checkpoint, the same on every rank; each rank reads and hashes its share of the files.

    ValueError, on every rank, if there are checkpoints but all are damaged.
    """
    found = broadcast_object(integrity.candidates(root) if groups.is_main else [], dist.group.WORLD)
    for folder in found:
        wrong = _fault(folder, groups)
        if wrong is None:
            return folder
        if groups.is_main:
            integrity.reject(folder, wrong)
    if found:
        raise ValueError(integrity.all_damaged(root, found))
    return None


def refuse_damaged(folder: Path, groups: ProcessGroups) -> None:
    """ValueError, on every rank, if a checkpoint is damaged; each rank reads and hashes its share of the files."""
    if wrong := _fault(folder, groups):
        raise ValueError(integrity.damaged(folder, wrong))


def _fault(folder: Path, groups: ProcessGroups) -> str | None:
    own_fault = next(integrity.faults_of_share(folder, groups.world_rank, dist.get_world_size()), None)
    return next((wrong for wrong in gather_objects(own_fault, dist.group.WORLD) if wrong), None)


def load(path: Path, policy: Policy, optimiser: Optimiser | None, groups: ProcessGroups) -> RunState:
    """Fill policy and optimizer from a checkpoint of any layout; returns the run's state given to `save`.

    A checkpoint that contains anything but data is refused (`pickles.refuse_code`) before any of it is loaded.

    optimiser None: weights only. ValueError if the folder is not a complete checkpoint, or has no optimizer state
    although an optimizer is given.
    """
    facts = integrity.read(path)
    refuse_code(path)
    if facts.base != policy.base:
        raise ValueError(
            f"checkpoint {path} belongs to {facts.base or 'no base'}, this recipe's model.weights to "
            f"{policy.base or 'none'}: adapters fit only the weights they were trained on; set model.weights to these"
        )
    own = _stored(path)
    if optimiser is not None and own.optimiser is None:
        raise ValueError(f"checkpoint {path} holds weights only: pass optimiser=None, or name a training checkpoint")
    with backend.vendor_calls():
        wanted = sharded_state(policy, optimiser, loading=True)
        # `wanted` describes this rank's shards and their memory; loading reshards from the saved layout
        for name, _ in _named_chunks(policy):
            wanted[name] = {key: _merged_in_place(value) for key, value in wanted[name].items()}
        loaded = _read(wanted, path)
        _take_model(policy, loaded)
        if optimiser is not None:
            if not optimiser.distributed and isinstance(_vendors(optimiser)[0].optimizer, _TORCH_ADAM):
                _count_from_zero(loaded["optimizer"])
            optimiser.vendor.load_state_dict(loaded["optimizer"])
    if optimiser is not None and own.optimiser is not None:
        optimiser.num_updates, optimiser.num_skipped = own.optimiser.updates, own.optimiser.skipped
        _restore_random_states(path, facts, policy, groups)
    return own.run


def _stored(path: Path) -> Stored:
    try:
        return parse_json((path / STATE).read_bytes(), Stored)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: its {STATE} is damaged ({error}); name another one") from None


def _read(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sharded state to read from a checkpoint. ValueError if the checkpoint lacks a part of it.

    Transformer Engine's modules, including norms, request an extra state even if it is empty. Torch's norms write none,
    so a checkpoint made without Transformer Engine (e.g. an import on a CPU) may lack those states and nothing else.
    """
    read: Any = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RETURN_UNEXPECTED)
    loaded, _, absent = read
    lacking = sorted(key for key in absent if _EXTRA_STATE not in key)
    if lacking:
        raise ValueError(
            f"checkpoint {path} lacks {len(lacking)} parts of this model, first {lacking[0]}: it was written "
            "with another model section; name a checkpoint of a recipe with the same one"
        )
    return loaded


def _merged_in_place(value: Any) -> Any:
    """A parameter that is stored in parts (SwiGLU's two projections), so that loading fills its memory in place.

    Megatron joins the parts in a new tensor before it copies this into the parameter, and holds these tensors for all
    layers at once: 0.4 copies of a model's weights. Parts that are not views of the parameter are joined as Megatron
    does.
    """
    if not isinstance(value, ShardedTensorFactory):
        return value
    whole, join = value.data.detach(), value.merge_fn

    def merge(parts: Any) -> Any:
        start = whole.data_ptr()
        for part in parts:
            if not part.is_contiguous() or part.data_ptr() != start:
                return join(parts)
            start += part.nbytes
        return whole if start == whole.data_ptr() + whole.nbytes else join(parts)

    return dataclasses.replace(value, merge_fn=merge)


def sharded_state(policy: Policy, optimiser: Optimiser | None, loading: bool) -> dict[str, Any]:
    """Weights and optimizer state as Megatron saves and loads them. Call it inside `vendor_calls`."""
    chunks = _named_chunks(policy)
    state: dict[str, Any] = {name: _trained(policy, chunk.sharded_state_dict()) for name, chunk in chunks}
    if optimiser is not None:
        whole = dict(state) if len(policy.chunks) > 1 else state["model"]
        _initialise_states(optimiser)
        state["optimizer"] = optimiser.vendor.sharded_state_dict(whole, is_loading=loading, metadata=_SHARDING)
    return state


def _trained(policy: Policy, state: dict[str, Any]) -> dict[str, Any]:
    """A chunk's state in a checkpoint: everything, or only the adapters."""
    return state if policy.lora is None else {key: value for key, value in state.items() if lora.is_adapter(key)}


def _named_chunks(policy: Policy) -> list[tuple[str, Any]]:
    if len(policy.chunks) == 1:
        return [("model", policy.chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(policy.chunks)]


def _vendors(optimiser: Optimiser) -> list[Any]:
    """Megatron's optimizers: one, or several that it chains."""
    return getattr(optimiser.vendor, "chained_optimizers", [optimiser.vendor])


def _initialise_states(optimiser: Optimiser) -> None:
    """Create the states of torch's Adam if there was no update yet, because a checkpoint without them cannot be loaded.

    A run may save before its first update if all groups of its rollouts were dropped. Megatron's sharded optimizer
    creates states by an update with zero gradients; at a rate of zero it changes no weight, and its step count is
    reset.
    """
    for vendor in _vendors(optimiser):
        if vendor.optimizer.state:
            continue
        if optimiser.distributed:
            for group in vendor.optimizer.param_groups:
                group["lr"] = 0.0
            vendor._init_optimizer_states_with_dummy_values()
        elif vendor.init_state_fn is not None:  # absent with optim.cpu_offload, whose optimizer creates its own
            vendor.init_state_fn(vendor.optimizer, vendor.config)
        for state in vendor.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
            elif isinstance(vendor.optimizer, _TORCH_ADAM):
                state["step"] = torch.zeros(())


def _count_from_zero(state: Any) -> None:
    """Give a loaded state of torch's Adam the step count 0 where it has none: Megatron saves no count of zero."""
    if not isinstance(state, dict):
        return
    of_parameters = state.get("state")
    if isinstance(of_parameters, dict) and "param_groups" in state:
        counted = "common_step" in of_parameters or any("step" in one for one in of_parameters.values())
        if of_parameters and not counted:
            of_parameters["common_step"] = torch.zeros(())
        return
    for part in state.values():
        _count_from_zero(part)


def _take_model(policy: Policy, loaded: dict[str, Any]) -> None:
    for name, chunk in _named_chunks(policy):
        absent, unknown = chunk.load_state_dict(loaded[name], strict=False)
        kept_elsewhere = [key for key in absent if policy.lora is not None and not lora.is_adapter(key)]
        wrong = [*unknown, *(key for key in absent if not key.endswith(_EXTRA_STATE) and key not in kept_elsewhere)]
        assert not wrong, f"checkpoint and model differ in {len(wrong)} tensor names, first {wrong[0]}"


def counters(optimiser: Optimiser) -> Counters:
    """The optimizer's counters now."""
    return Counters(optimiser.num_updates, optimiser.num_skipped)


def layout(groups: ProcessGroups, policy: Policy) -> dict[str, int]:
    """The sizes that determine which rank holds which parameters."""
    sizes = {"tp": groups.tp_size, "pp": groups.pp_size, "dp": groups.dp_size}
    return sizes | {"virtual_pp": len(policy.chunks)}


def random_file(rank: int) -> str:
    """File of a rank's random states."""
    return f"random-{rank:05d}.pt"


def random_states() -> RandomStates:
    """Every generator of this process."""
    state = np.random.get_state(legacy=False)
    keys = torch.from_numpy(np.asarray(state["state"]["key"], np.int64))
    tracker: Any = get_cuda_rng_tracker()
    return {
        "python": random.getstate(),
        "numpy": (state["bit_generator"], keys, state["state"]["pos"], state["has_gauss"], state["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": tracker.get_states(),
    }


def _restore_random_states(path: Path, facts: integrity.Facts, policy: Policy, groups: ProcessGroups) -> None:
    if facts.layout != layout(groups, policy):
        logger.warning(
            "checkpoint %s was written on layout %s: the random generators' states are not restored",
            path,
            facts.layout,
        )
        return
    set_random_states(torch.load(path / random_file(groups.world_rank), map_location="cpu", weights_only=True))


def set_random_states(states: RandomStates) -> None:
    """Restore the states from `random_states`; the device's generators only if they come from the same device type."""
    kind, keys, position, has_normal, normal = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_normal, normal))
    torch.set_rng_state(states["torch"])
    if states["cuda"].shape != torch.cuda.get_rng_state().shape:  # the run began on another device type
        logger.warning("the checkpoint was written on another kind of device: its generator's state is not restored")
        return
    torch.cuda.set_rng_state(states["cuda"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(states["megatron"])
