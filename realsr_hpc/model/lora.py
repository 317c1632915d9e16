"""Low-rank adapters on the policy's linear layers, split over tensor-parallel ranks like these layers.

LoRA (Hu et al., arXiv 2106.09685): y = W x + (alpha / rank) B A x with W frozen, A [rank, in] random, B [out, rank]
zero at the start. An adapter belongs to one Hugging Face projection (`q_proj`, `gate_proj`, ...), also where Megatron
fuses several into one layer, so that adapters and PEFT's files are one to one.

A forward hook adds the product, so it works for any linear layer: torch's, FP8-emulating ones, Transformer Engine's.
Where tensor parallelism cuts the layer's outputs, B is cut by rows and A is whole; where it cuts the inputs, A is cut
by columns and B is whole. There is no dropout on adapters: it would make sampler and scorer differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any  # autograd's contexts, Megatron's and Transformer Engine's linear layers, and their hooks

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from realsr_hpc.config.schema import LoRAConfig
from realsr_hpc.model.chunks import Policy, SumGradient

NAME = "lora"
"""Name of the adapters' submodule in its linear layer: `linear_qkv.lora.q_proj.a`."""


@dataclass(frozen=True)
class Site:
    """A linear layer of a transformer layer, and the projections that it holds."""

    linear: str
    projections: tuple[str, ...]
    inputs_cut: bool
    """Tensor parallelism cuts its inputs (Megatron's row-parallel layers), not its outputs."""

    @property
    def block(self) -> str:
        """Name of the Hugging Face block that the projections are in."""
        return "self_attn" if self.linear.startswith("self_attention") else "mlp"


SITES = (
    Site("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj"), False),
    Site("self_attention.linear_proj", ("o_proj",), True),
    Site("mlp.linear_fc1", ("gate_proj", "up_proj"), False),
    Site("mlp.linear_fc2", ("down_proj",), True),
)


class Adapter(nn.Module):
    """A and B of one projection on this rank."""

    def __init__(self, inputs: int, outputs: int, rank: int, like: Tensor) -> None:
        """inputs, outputs: sizes of this rank's part; like: a tensor with the number format and device."""
        super().__init__()
        self.a = nn.Parameter(like.new_zeros(rank, inputs))
        self.b = nn.Parameter(like.new_zeros(outputs, rank))


class Adapters(nn.Module):
    """The adapters of one linear layer."""

    def __init__(self, site: Site, linear: Any, lora: LoRAConfig, policy: Policy) -> None:
        super().__init__()
        self.site, self.scale, self.on = site, lora.alpha / lora.rank, True
        self.kv_heads = policy.shapes.kv_heads // policy.groups.tp_size
        self.tp_group, self.tp_size = policy.groups.tp, policy.groups.tp_size
        self.sequence_parallel = policy.config.sequence_parallel
        self.widths = _outputs(site, policy)
        """Number of outputs of each projection on this rank, including projections without an adapter."""
        for name in site.projections:
            if name in lora.targets:
                adapter = Adapter(linear.weight.shape[1], self.widths[name], lora.rank, linear.weight)
                self.add_module(name, adapter)
                self._mark(adapter)

    def __getitem__(self, name: str) -> Adapter:
        return self.get_submodule(name)  # type: ignore[return-value]

    @property
    def names(self) -> list[str]:
        """Projections that have an adapter."""
        return list(self._modules)

    def _mark(self, adapter: Adapter) -> None:
        """Mark the parameters for Megatron: which are sharded, and which have only a partial gradient on a rank."""
        cut, whole = (adapter.a, adapter.b) if self.site.inputs_cut else (adapter.b, adapter.a)
        for parameter, is_cut in ((cut, True), (whole, False)):
            marks: Any = parameter
            marks.tensor_model_parallel = is_cut
            marks.partition_dim = (1 if self.site.inputs_cut else 0) if is_cut else -1
            marks.partition_stride = 1
        # under sequence parallelism the unsplit matrix sees this rank's tokens only: its gradient is summed over tp
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def inner(self) -> Tensor:
        """Every A, stacked: [adapters x rank, in], so that one product computes all of them."""
        return torch.cat([self[name].a for name in self.names])

    def outputs(self, hidden: Tensor) -> Tensor:
        """(alpha / rank) B h in the order of the layer's outputs: h [..., adapters x rank] -> [..., out], on this rank.

        Linear in h, so that decoding may sum over tensor-parallel ranks after it instead of before.
        """
        # [..., adapters x rank] -> one [..., rank] per adapter -> [..., out of its projection]
        parts = zip(self.names, hidden.chunk(len(self.names), -1), strict=True)
        rows = {name: F.linear(part, self[name].b) for name, part in parts}
        return self.scale * self._in_order(rows, hidden.dim() - 1)

    def _in_order(self, parts: dict[str, Tensor], dim: int) -> Tensor:
        """Projections joined along their output dim, in the fused layer's order; those without an adapter are 0."""
        first = next(iter(parts.values()))
        shapes = {name: (*first.shape[:dim], width, *first.shape[dim + 1 :]) for name, width in self.widths.items()}
        every = [parts[name] if name in parts else first.new_zeros(shape) for name, shape in shapes.items()]
        if len(every) < 3:
            return torch.cat(every, dim)
        # Megatron's fused order, key head by key head: its queries, the key, the value: [..., kv, (h/kv + 2) d]
        by_head = [part.unflatten(dim, (self.kv_heads, -1)) for part in every]
        return torch.cat(by_head, dim + 1).flatten(dim, dim + 1)

    def forward(self, x: Tensor) -> Tensor:
        """The term to add to the layer's output: the layer's input [S, b, in] -> [S, b, out].

        With sequence parallelism S is this rank's share on the side that tensor parallelism does not cut.
        """
        hidden = F.linear(x, self.inner())  # [S, b, adapters x rank], of this rank's inputs and tokens
        if self.site.inputs_cut and self.sequence_parallel:  # add the ranks' partial sums; each keeps its tokens
            hidden = reduce_scatter_to_sequence_parallel_region(hidden.contiguous(), group=self.tp_group)
        elif self.site.inputs_cut and self.tp_size > 1:
            hidden = reduce_from_tensor_model_parallel_region(hidden.contiguous(), group=self.tp_group)
        elif self.sequence_parallel:  # the outputs are split, so each rank needs all tokens
            hidden = gather_from_sequence_parallel_region(
                hidden.contiguous(), tensor_parallel_output_grad=True, group=self.tp_group
            )
        elif self.tp_size > 1:  # each rank's outputs give a part of the gradient of A h
            hidden = SumGradient.apply(hidden, self.tp_group)
        return self.outputs(hidden)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) B A, this rank's [out, in], computed in float32."""
        # [out, rank] @ [rank, in] -> [out, in] per projection
        products = {name: self[name].b.float() @ self[name].a.float() for name in self.names}
        return (weight.float() + self.scale * self._in_order(products, 0)).to(weight.dtype)

    def cut_dims(self) -> dict[str, int]:
        """Parameter name within the linear layer -> dim that is split over tp."""
        which, dim = ("a", 1) if self.site.inputs_cut else ("b", 0)
        return {f"{NAME}.{name}.{which}": dim for name in self.names}


def _outputs(site: Site, policy: Policy) -> dict[str, int]:
    shapes, tp = policy.shapes, policy.groups.tp_size
    table = {
        "q_proj": shapes.heads * shapes.head_dim // tp,
        "k_proj": shapes.kv_heads * shapes.head_dim // tp,
        "v_proj": shapes.kv_heads * shapes.head_dim // tp,
        "o_proj": shapes.hidden,
        "gate_proj": shapes.ffn // tp,
        "up_proj": shapes.ffn // tp,
        "down_proj": shapes.hidden,
    }
    return {name: table[name] for name in site.projections}


def attach(policy: Policy, lora: LoRAConfig, seed: int) -> None:
    """Freeze the policy and add adapters with B = 0, which do not change it yet; A is the same on every layout."""
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    for chunk in policy.chunks:
        if chunk.pre_process:
            # a recomputed layer runs its backward pass only if its input requires a gradient
            chunk.embedding.register_forward_hook(_require_gradient)
        for layer in chunk.decoder.layers:
            for site in SITES:
                linear: Any = layer.get_submodule(site.linear)
                linear.register_forward_hook(_order_gradient)
                if not set(site.projections) & set(lora.targets):
                    continue
                adapters = Adapters(site, linear, lora, policy)
                linear.add_module(NAME, adapters)
                linear.register_forward_hook(_add, prepend=True)
                _shard_with(linear, adapters)
    policy.lora = lora
    for name, parameter in parameters(policy):
        if parameter.device.type != "meta" and name.endswith("lora_A.weight"):
            parameter.data.copy_(part_of(_draw(name, parameter, policy, seed), name, policy))


def _require_gradient(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output


class _OrderedGradient(torch.autograd.Function):
    """Identity whose gradient is made contiguous.

    A frozen layer multiplies the gradient [S, b, out] of its output with its weight [out, in]. If the gradient is a
    transposed view (as the policy's output is), torch computes S products instead, each with a copy of the weight: this
    takes hundreds of times the memory of an activation, and it is slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0].contiguous().view(-1).view(grad_outputs[0].shape)  # resets strides of size-1 dims


def _order_gradient(linear: Any, arguments: Any, output: Any) -> Any:
    product, bias = output
    return (_OrderedGradient.apply(product), bias) if torch.is_grad_enabled() else output


def _add(linear: Any, arguments: tuple[Tensor, ...], output: Any) -> Any:
    adapters: Adapters = linear.get_submodule(NAME)
    if not adapters.on:
        return output
    product, bias = output
    return product + adapters(arguments[0]), bias


def _shard_with(linear: Any, adapters: Adapters) -> None:
    """Describe to Megatron's checkpoints how the adapters are split; the linear layer would describe them as whole."""
    describe = linear.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = describe(prefix, sharded_offsets, metadata)
        tensors = {f"{NAME}.{key}": value for key, value in adapters.state_dict(keep_vars=True).items()}
        groups = {"tp_group": adapters.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return state | make_sharded_tensors_for_checkpoint(
            tensors, prefix, adapters.cut_dims(), sharded_offsets, **groups
        )

    linear.sharded_state_dict = sharded_state_dict


def adapted(policy: Policy) -> Iterator[tuple[int, Any, Adapters]]:
    """(layer counted from 0, linear layer, its adapters) of every linear layer with adapters on this rank."""
    for chunk in policy.chunks:
        for layer in chunk.decoder.layers:
            for site in SITES:
                linear: Any = layer.get_submodule(site.linear)
                if (found := adapters_of(linear)) is not None:
                    yield layer.layer_number - 1, linear, found  # pyright: ignore[reportOperatorIssue, reportReturnType]


def is_adapter(key: str) -> bool:
    """Whether a parameter's name in a chunk is an adapter's."""
    return f".{NAME}." in key


def adapters_of(linear: nn.Module) -> Adapters | None:
    """The adapters of a linear layer; None if it has none."""
    found = linear._modules.get(NAME)
    return found if isinstance(found, Adapters) else None


def parameters(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    """(PEFT's name, local parameter): `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    for layer, _, adapters in adapted(policy):
        for name in adapters.names:
            stem = f"model.layers.{layer}.{adapters.site.block}.{name}"
            yield f"{stem}.lora_A.weight", adapters[name].a
            yield f"{stem}.lora_B.weight", adapters[name].b


@contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """Context in which the policy equals its start model: with LoRA the frozen reference needs no second copy."""
    found = [adapters for _, _, adapters in adapted(policy)]
    for adapters in found:
        adapters.on = False
    try:
        yield
    finally:
        for adapters in found:
            adapters.on = True


def merging(policy: Policy) -> Callable[[Tensor], Tensor]:
    """Function that returns a parameter's value with its adapters merged in; other parameters unchanged."""
    by_weight = {id(linear.weight): adapters for _, linear, adapters in adapted(policy)}

    def value(parameter: Tensor) -> Tensor:
        adapters = by_weight.get(id(parameter))
        return parameter.detach() if adapters is None else adapters.merged(parameter)

    return value


def whole_shape(name: str, policy: Policy) -> tuple[int, int]:
    """Shape of a whole A or B by PEFT's name."""
    assert policy.lora is not None, "the policy has no adapters"
    projection, which = name.split(".")[-3], name.split(".")[-2]
    shapes = policy.shapes
    inputs = {"down_proj": shapes.ffn, "o_proj": shapes.heads * shapes.head_dim}.get(projection, shapes.hidden)
    site = next(site for site in SITES if projection in site.projections)
    cut = 1 if site.inputs_cut else policy.groups.tp_size
    outputs = _outputs(site, policy)[projection] * cut
    return (policy.lora.rank, inputs) if which == "lora_A" else (outputs, policy.lora.rank)


def cut_dim(name: str) -> int | None:
    """Dim along which tensor parallelism splits a whole A or B; None: every rank holds it whole."""
    projection, which = name.split(".")[-3], name.split(".")[-2]
    inputs_cut = any(projection in site.projections and site.inputs_cut for site in SITES)
    if which == "lora_A":
        return 1 if inputs_cut else None
    return None if inputs_cut else 0


def part_of(whole: Tensor, name: str, policy: Policy) -> Tensor:
    """This rank's part of a whole A or B."""
    dim = cut_dim(name)
    return whole if dim is None else whole.chunk(policy.groups.tp_size, dim)[policy.groups.tp_rank]


def _draw(name: str, parameter: Tensor, policy: Policy, seed: int) -> Tensor:
    """A whole A as PEFT draws it (uniform within 1 / sqrt(in)), one generator per tensor."""
    shape = whole_shape(name, policy)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
