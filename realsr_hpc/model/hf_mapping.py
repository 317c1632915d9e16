"""One table that maps Hugging Face's Chameleon to Megatron and back: names, shapes and tensor-parallel splits.

Each row names one local parameter, the Hugging Face tensors it consists of, and how it is split over tp. Reading fills
the local shard directly; writing gathers one parameter at a time to world rank 0. Random initial weights use the same
table (one generator per tensor, by name), so that they do not depend on the layout.

Shared q and k norms ([head_dim] or [groups, head_dim], as Meta's and Lumina's weights have them) are spread over the
heads. The image tokenizer's weights (`model.vqmodel.*`) are not in this table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal  # Any: the marks that Megatron sets on parameters

import torch
import torch.distributed as dist
from torch import Tensor

from realsr_hpc.formats.fitting import grouped, whole
from realsr_hpc.model.chunks import Policy, WeightShapes

Cut = Literal["whole", "rows", "columns", "qkv", "gate_up", "heads", "vocabulary"]
Reader = Callable[[str], Tensor]
"""Hugging Face name (prefix `model.`) -> the whole tensor."""


@dataclass(frozen=True)
class Row:
    """A local parameter and the Hugging Face tensors it holds; `{i}`: index of the layer, local in `local`."""

    local: str
    hf: tuple[str, ...]
    cut: Cut


EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")
FINAL = (
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    Row("output_layer.weight", ("lm_head.weight",), "vocabulary"),
)
_L, _H = "decoder.layers.{i}.", "model.layers.{i}."
LAYER = (
    Row(_L + "input_layernorm.weight", (_H + "input_layernorm.weight",), "whole"),
    Row(
        _L + "self_attention.linear_qkv.weight",
        tuple(_H + f"self_attn.{x}_proj.weight" for x in "qkv"),
        "qkv",
    ),
    Row(_L + "self_attention.q_layernorm.weight", (_H + "self_attn.q_norm.weight",), "heads"),
    Row(_L + "self_attention.q_layernorm.bias", (_H + "self_attn.q_norm.bias",), "heads"),
    Row(_L + "self_attention.k_layernorm.weight", (_H + "self_attn.k_norm.weight",), "heads"),
    Row(_L + "self_attention.k_layernorm.bias", (_H + "self_attn.k_norm.bias",), "heads"),
    Row(_L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), "columns"),
    Row(_L + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), "whole"),
    Row(
        _L + "mlp.linear_fc1.weight",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        "gate_up",
    ),
    Row(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), "columns"),
)


def hf_shape(name: str, shapes: WeightShapes) -> tuple[int, ...]:
    """Shape of a Hugging Face tensor by its name."""
    s, d = shapes, shapes.head_dim
    table: dict[str, tuple[int, ...]] = {
        "q_proj": (s.heads * d, s.hidden),
        "k_proj": (s.kv_heads * d, s.hidden),
        "v_proj": (s.kv_heads * d, s.hidden),
        "o_proj": (s.hidden, s.heads * d),
        "q_norm": (s.heads, d),
        "k_norm": (s.kv_heads, d),
        "gate_proj": (s.ffn, s.hidden),
        "up_proj": (s.ffn, s.hidden),
        "down_proj": (s.hidden, s.ffn),
        "embed_tokens": (s.vocab, s.hidden),
        "lm_head": (s.vocab, s.hidden),
    }
    return table.get(name.split(".")[-2], (s.hidden,))


def hf_shapes(shapes: WeightShapes) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the language model with its shape, in order."""
    return {name: hf_shape(name, shapes) for name in hf_names(shapes)}


def hf_names(shapes: WeightShapes) -> list[str]:
    """Every Hugging Face tensor of the language model, in order."""
    rows = [EMBEDDING, *(row for _ in range(shapes.num_layers) for row in LAYER), *FINAL]
    layers = [0, *(i for i in range(shapes.num_layers) for _ in LAYER), *(0 for _ in FINAL)]
    return [name.format(i=i) for row, i in zip(rows, layers, strict=True) for name in row.hf]


def merge(row: Row, tensors: list[Tensor], shapes: WeightShapes, tp_size: int, tp_rank: int) -> Tensor:
    """Whole Hugging Face tensors -> this tensor rank's parameter."""
    if row.cut == "whole":
        return tensors[0]
    if row.cut == "qkv":
        # q [h d, H], k and v [kv d, H] -> [kv, h/kv d, H], [kv, d, H] -> Megatron's [kv, (h/kv + 2) d, H], split by kv
        groups = [t.view(shapes.kv_heads, -1, shapes.hidden) for t in tensors]
        return torch.cat(groups, 1).chunk(tp_size, 0)[tp_rank].reshape(-1, shapes.hidden)
    if row.cut == "gate_up":  # each rank holds its part of both, gate above up: [2 ffn / tp, H]
        return torch.cat([t.chunk(tp_size, 0)[tp_rank] for t in tensors])
    if row.cut == "columns":
        return tensors[0].chunk(tp_size, 1)[tp_rank]
    whole = _pad_rows(tensors[0], tp_size) if row.cut == "vocabulary" else tensors[0]
    return whole.chunk(tp_size, 0)[tp_rank]


def split(row: Row, shards: list[Tensor], shapes: WeightShapes) -> list[Tensor]:
    """All tensor ranks' parameters -> the whole Hugging Face tensors; the inverse of `merge`."""
    if row.cut == "whole":
        return [shards[0]]
    if row.cut == "qkv":  # rank by rank, [kv / tp, (h/kv + 2) d, H] -> queries, keys and values of all heads
        d, queries = shapes.head_dim, shapes.heads // shapes.kv_heads
        grouped = torch.cat([s.view(-1, (queries + 2) * d, shapes.hidden) for s in shards])
        return [part.reshape(-1, shapes.hidden) for part in grouped.split([queries * d, d, d], 1)]
    if row.cut == "gate_up":
        # each rank holds [gate / tp; up / tp]: halve, then join the gates and the ups of all ranks, [ffn, H] each
        return [torch.cat(half) for half in zip(*(s.chunk(2, 0) for s in shards), strict=True)]
    if row.cut == "columns":
        return [torch.cat(shards, 1)]
    whole = torch.cat(shards)
    return [whole[: shapes.vocab] if row.cut == "vocabulary" else whole]


def _pad_rows(whole: Tensor, multiple: int) -> Tensor:
    missing = -whole.size(0) % multiple
    return torch.cat([whole, whole.new_zeros(missing, whole.size(1))]) if missing else whole


@torch.no_grad()
def hf_to_local(read: Reader, policy: Policy) -> None:
    """Fill the local chunks from whole tensors that `read` gives by name. ValueError for a shape that does not fit."""
    groups, shapes = policy.groups, policy.shapes
    for row, layer, parameter in _local_rows(policy):
        tensors = [_read(read, name.format(i=layer), shapes) for name in row.hf]
        parameter.copy_(merge(row, tensors, shapes, groups.tp_size, groups.tp_rank))


def _local_rows(policy: Policy) -> Iterator[tuple[Row, int, Tensor]]:
    """(row, global layer index, parameter) of every parameter on this rank, in the table's order."""
    for chunk in policy.chunks:
        parameters = dict(chunk.named_parameters())
        if chunk.pre_process:
            yield EMBEDDING, 0, parameters[EMBEDDING.local]
        for index, layer in enumerate(chunk.decoder.layers):
            for row in LAYER:
                yield row, layer.layer_number - 1, parameters[row.local.format(i=index)]  # pyright: ignore[reportOperatorIssue, reportReturnType]
        if chunk.post_process:
            yield from ((row, 0, parameters[row.local]) for row in FINAL)


def mark_cuts(policy: Policy) -> None:
    """Mark for Megatron which parameters are split over tp.

    Megatron's layers set the marks while they draw random weights, which we skip. Without the marks the gradient norm
    would count only the first tensor rank's shard.
    """
    for row, _, parameter in _local_rows(policy):
        marks: Any = parameter
        marks.tensor_model_parallel = row.cut != "whole"
        marks.partition_dim = 1 if row.cut == "columns" else 0 if row.cut != "whole" else -1
        marks.partition_stride = 1


def _read(read: Reader, name: str, shapes: WeightShapes) -> Tensor:
    tensor, wanted = read(name), hf_shape(name, shapes)
    if name.split(".")[-2] in ("q_norm", "k_norm") and grouped(tuple(tensor.shape), wanted):
        tensor = whole(tensor, wanted)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"weights: {name} has shape {tuple(tensor.shape)}, the recipe's model section has {wanted}: "
            "set the model section (and the vocabulary) to those of the weights"
        )
    return tensor


def init_weights(policy: Policy, seed: int, std: float = 0.02) -> None:
    """Random weights: normal with `std`, residual outputs with std / sqrt(2 layers), norms one and zero."""
    residual_std = std / (2 * policy.shapes.num_layers) ** 0.5

    def draw(name: str) -> Tensor:
        shape = hf_shape(name, policy.shapes)
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        # one generator per tensor: the weights depend on neither the layout nor the order of drawing
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        scale = residual_std if "o_proj" in name or "down_proj" in name else std
        return torch.randn(shape, generator=generator) * scale

    hf_to_local(draw, policy)


def local_to_hf(policy: Policy, part: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The whole weights in world rank 0's host memory; {} elsewhere. See `hf_tensors`, which never holds them all."""
    return {name: tensor for name, tensor in hf_tensors(policy, part) if tensor is not None}


@torch.no_grad()
def hf_tensors(policy: Policy, part: Callable[[Tensor], Tensor] | None = None) -> Iterator[tuple[str, Tensor | None]]:
    """Name and whole tensor, one parameter gathered at a time, in the order of `hf_names`.

    The tensor is in host memory on world rank 0 and None elsewhere. Every rank of the first data-parallel replica must
    exhaust the iterator (all ranks may). part: what to gather instead of a parameter's value, e.g. its gradient.
    """
    groups, shapes = policy.groups, policy.shapes
    owned = {(row.local, layer): (row, parameter) for row, layer, parameter in _local_rows(policy)}
    for (row, layer), stage in _owners(policy):
        names = [name.format(i=layer) for name in row.hf]
        if stage == groups.pp_rank:
            _, parameter = owned[row.local, layer]
            value = parameter.detach() if part is None else part(parameter)
            tensors = [t.contiguous() for t in split(row, _shards(value, row, policy), shapes)]
        else:
            dtype = _part_dtype(policy, part)
            tensors = [torch.empty(hf_shape(n, shapes), dtype=dtype, device=groups.device) for n in names]
        if groups.pp_size > 1:  # from the stage that holds the layer to all others, world rank 0 among them
            source = dist.get_global_rank(groups.pp, stage)
            for tensor in tensors:
                dist.broadcast(tensor, source, group=groups.pp)
        for name, tensor in zip(names, tensors, strict=True):
            yield name, tensor.cpu().clone() if groups.is_main else None


def _part_dtype(policy: Policy, part: Callable[[Tensor], Tensor] | None) -> torch.dtype:
    first = next(policy.parameters())
    return first.dtype if part is None else part(first).dtype


def _shards(value: Tensor, row: Row, policy: Policy) -> list[Tensor]:
    if row.cut == "whole" or policy.groups.tp_size == 1:
        return [value]
    # [part] of every tensor rank, in rank order
    shards = [torch.empty_like(value) for _ in range(policy.groups.tp_size)]
    dist.all_gather(shards, value.contiguous(), group=policy.groups.tp)
    return shards


def _owners(policy: Policy) -> Iterator[tuple[tuple[Row, int], int]]:
    """Every row of the whole model with the stage that holds it, in the same order on all ranks."""
    last = policy.groups.pp_size - 1
    yield (EMBEDDING, 0), 0
    for layer in range(policy.shapes.num_layers):
        for row in LAYER:
            yield (row, layer), policy.stage_of(layer)
    for row in FINAL:
        yield (row, 0), last
