"""Reductions of numbers and exchange of small Python objects over a group."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from realsr_hpc.parallel.process_groups import ProcessGroups

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""None: all processes, as in `torch.distributed`; `group.WORLD` is None before initialisation."""
Reduction = Literal["sum", "mean", "max", "min"]
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def reduce_floats(
    values: dict[str, float], group: Group, device: torch.device, how: Reduction = "mean"
) -> dict[str, float]:
    """Each value reduced over the group, in float64. Every rank must pass the same keys, in any order."""
    names = sorted(values)
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed, _OPERATIONS[how], group=group)
    if how == "mean":
        packed /= dist.get_world_size(group)
    return dict(zip(names, packed.tolist(), strict=True))


def reduce_float(value: float, group: Group, device: torch.device, how: Reduction = "sum") -> float:
    """One number reduced over the group, in float64."""
    return reduce_floats({"value": value}, group, device, how)["value"]


def broadcast_from_last_stage(value: T, groups: ProcessGroups) -> T:
    """The last pipeline stage's object, on every stage. It is pickled, so it should be small."""
    return broadcast_object(value, groups.pp, groups.pp_size - 1)


def broadcast_object(value: T, group: Group, source: int = 0) -> T:
    """The object of the group's rank `source`, on every rank."""
    if dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source if group is None else dist.get_global_rank(group, source), group=group)
    return box[0]


def gather_objects(value: T, group: Group) -> list[T]:
    """Every rank's object, in rank order, on every rank."""
    gathered = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
