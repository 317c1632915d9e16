"""The policy: this process's chunks of one model, and its interface to other rooms.

Its last stage returns the hidden states after the final norm, not logits: log-probabilities are computed from
(hidden, output_weight) in chunks over the sharded vocabulary, so that [tokens, vocabulary] never exists whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any  # autograd's contexts

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from realsr_hpc.config.schema import LoRAConfig, ModelConfig
from realsr_hpc.model.attention import BranchedRows, segment_mask
from realsr_hpc.parallel import layout
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.parallel.process_groups import ProcessGroups


@dataclass(frozen=True)
class WeightShapes:
    """The sizes that determine the shape of every tensor."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> WeightShapes:
        """Sizes of a model configuration."""
        return cls(
            model.num_layers, model.hidden_size, model.num_heads, kv_heads(model), model.ffn_hidden_size, vocab_size
        )


class SumGradient(torch.autograd.Function):
    """Identity; the gradient is summed over the group.

    Megatron's copy_to_tensor_model_parallel_region reduces a contiguous copy of a strided gradient and returns the
    gradient unreduced: silently wrong behind a transpose.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return `hidden`, of any shape, unchanged."""
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient summed over the group."""
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class PolicyChunk(GPTModel):
    """One chunk of layers; with the embedding if first and the output weight if last."""

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        branches: layout.Branches | None = None,
        image_blocks: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 [b, S] -> last chunk: hidden [b, S, H]; others: [S/sp, b, H].

        segment_ids, branches and image_blocks describe the rows, as in `Microbatch`. The gradient with respect to the
        hidden states may be one tensor rank's part (from its vocabulary shard): it is summed over tp here.
        """
        # hidden [S/sp, b, H]; rotary angles [S, 1, 1, d]
        hidden, rotary, *_ = self._preprocess(input_ids=tokens, position_ids=None)  # pyright: ignore[reportArgumentType]
        mask, rows = None, None
        if branches is not None:
            rows = BranchedRows(branches, image_blocks)
            rotary = rotary[rows.positions(tokens.shape[1], rotary.device)]  # pyright: ignore[reportOptionalMemberAccess, reportOptionalSubscript]
        elif segment_ids is not None:
            mask = segment_mask(segment_ids)
        hidden = self.decoder(hidden_states=hidden, attention_mask=mask, attention_bias=rows, rotary_pos_emb=rotary)
        if not self.post_process:
            return hidden
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        elif group.size() > 1:
            hidden = SumGradient.apply(hidden, group)
        return hidden.transpose(0, 1)


@dataclass
class Policy:
    """One model: the chunks on this rank, with their process groups and sizes."""

    chunks: list[PolicyChunk]
    """One, or `virtual_pp` of them in pipeline order."""
    config: TransformerConfig
    groups: ProcessGroups
    shapes: WeightShapes
    vocab_size: int
    """Number of token ids; the weights have `padded_vocab_size` rows, split over the tensor-parallel ranks."""
    padded_vocab_size: int
    rollout_fp8_layers: tuple[int, ...] = ()
    """Layers, from 1, whose products rollouts compute in FP8."""
    decode_graphs: bool = False
    """Whether rollouts replay decode steps of fixed shapes (as CUDA graphs on a GPU)."""
    lora: LoRAConfig | None = None
    """Low-rank adapters that are trained in place of the weights (model/lora.py); None: there are none."""
    base: str | None = None
    """With adapters: identifies their base weights, by a checksum of the files or the seed of a random start."""

    @property
    def output_weight(self) -> Tensor:
        """Output rows of this tensor rank, [padded_vocab / tp, H]. ValueError on all stages but the last."""
        if not self.groups.is_last_stage:
            raise ValueError(f"output_weight is on the last pipeline stage; this is stage {self.groups.pp_rank}")
        return self.chunks[-1].output_layer.weight  # pyright: ignore[reportReturnType]

    def stage_of(self, layer: int) -> int:
        """Pipeline stage that holds a layer, counted from 0 over the whole model."""
        per_chunk = self.shapes.num_layers // (self.groups.pp_size * len(self.chunks))
        return layer // per_chunk % self.groups.pp_size

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of all local chunks."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    def train(self, mode: bool = True) -> Policy:
        """Set training mode; only there are activations recomputed."""
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    def eval(self) -> Policy:
        """Set evaluation mode."""
        return self.train(False)

    def offload(self, to_host: bool) -> None:
        """Move a frozen model's weights to host memory, or back to its device. ValueError for a trainable one."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError("offload moves a frozen policy; this one is trainable (build it with trainable=False)")
        target = torch.device("cpu") if to_host else self.groups.device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(target, non_blocking=True)
        if to_host:
            torch.cuda.empty_cache()
