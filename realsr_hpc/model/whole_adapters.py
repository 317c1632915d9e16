"""Gathers whole adapters, by PEFT's names, from the ranks that hold their parts, and distributes them to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from realsr_hpc.model.chunks import Policy
from realsr_hpc.model.lora import SITES, cut_dim, parameters, part_of, whole_shape


@torch.no_grad()
def whole_tensors(
    policy: Policy, part: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor | None]]:
    """Every whole A and B by PEFT's name, in host memory on world rank 0, None elsewhere.

    Every rank must exhaust the iterator. part: what to gather of a parameter, e.g. its gradient.
    """
    groups, local = policy.groups, {name: part(parameter) for name, parameter in parameters(policy)}
    kinds = dict.fromkeys(name.split(".", 3)[3] for name in local)
    first = next(iter(local.values()))
    for layer in range(policy.shapes.num_layers):
        for kind in kinds:
            name = f"model.layers.{layer}.{kind}"
            stage = policy.stage_of(layer)
            if stage == groups.pp_rank:
                whole = _gathered(local[name], cut_dim(name), policy)
            else:
                whole = first.new_empty(whole_shape(name, policy))
            if groups.pp_size > 1:
                dist.broadcast(whole, dist.get_global_rank(groups.pp, stage), group=groups.pp)
            yield name, whole.cpu().clone() if groups.is_main else None


def _gathered(value: Tensor, dim: int | None, policy: Policy) -> Tensor:
    if dim is None or policy.groups.tp_size == 1:
        return value.contiguous()
    shards = [torch.empty_like(value) for _ in range(policy.groups.tp_size)]
    dist.all_gather(shards, value.contiguous(), group=policy.groups.tp)
    return torch.cat(shards, dim)


@torch.no_grad()
def load(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of the adapters from whole tensors of all layers, by PEFT's names.

    ValueError, on every rank, if a tensor is missing, is superfluous or has another shape.
    """
    _refuse_others(policy, tensors)
    for name, parameter in parameters(policy):
        parameter.copy_(part_of(tensors[name], name, policy))


def names(policy: Policy) -> list[str]:
    """PEFT's names of every whole A and B, of all layers."""
    assert policy.lora is not None, "the policy has no adapters"
    return [
        f"model.layers.{layer}.{site.block}.{projection}.{which}.weight"
        for layer in range(policy.shapes.num_layers)
        for site in SITES
        for projection in site.projections
        if projection in policy.lora.targets
        for which in ("lora_A", "lora_B")
    ]


def _refuse_others(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    assert policy.lora is not None, "the policy has no adapters"
    wanted, targets = names(policy), list(policy.lora.targets)
    for name in sorted(tensors.keys() - set(wanted)):
        why = f"the recipe has model.num_layers {policy.shapes.num_layers} and model.lora.targets {targets}"
        raise ValueError(f"model.lora.weights: {name} does not belong here: {why}; set both to those of the adapter")
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"model.lora.weights: no tensor {name}; set model.lora.targets to those of the adapter")
        shape, ours = tuple(tensors[name].shape), whole_shape(name, policy)
        if shape != ours:
            raise ValueError(
                f"model.lora.weights: {name} has shape {shape}, the recipe needs {ours}: set model.lora.rank and the "
                "model section to those of the adapter"
            )
