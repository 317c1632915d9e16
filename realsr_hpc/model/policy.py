"""The policy: this process's chunks of one model.

Its last stage returns the hidden states after the final norm, not logits: log-probabilities are computed from
(hidden, output_weight) in chunks over the sharded vocabulary, so that [tokens, vocabulary] never exists whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.attention import BranchedRows, segment_mask
from realsr_hpc.model.fp8 import start_emulation
from realsr_hpc.model.hf_mapping import WeightShapes, init_weights, load_hf_weights, mark_cuts
from realsr_hpc.model.precision import emulates_fp8, rollout_fp8_layers
from realsr_hpc.model.spec import block_spec, transformer_config
from realsr_hpc.parallel import backend, layout
from realsr_hpc.parallel.groups import Groups


class _SumGradient(torch.autograd.Function):
    """Identity; the gradient is summed over the group.

    Megatron's copy_to_tensor_model_parallel_region reduces a contiguous copy of a strided gradient and returns the
    gradient unreduced: silently wrong behind a transpose.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class PolicyChunk(GPTModel):
    """One chunk of layers; with the embedding if first and the output weight if last."""

    def forward(
        self, tokens: Tensor, segment_ids: Tensor | None = None, branches: layout.Branches | None = None
    ) -> Tensor:
        """tokens int64 [b, S] -> last chunk: hidden [b, S, H]; others: [S/sp, b, H].

        segment_ids and branches say what the rows hold, as `Microbatch` does. The gradient that comes back into the
        hidden states may be one tensor rank's share (from its vocabulary shard): it is summed over tp here.
        """
        hidden, rotary, *_ = self._preprocess(input_ids=tokens, position_ids=None)
        mask, rows = None, None
        if branches is not None:
            rows = BranchedRows(branches, segment_ids)
            rotary = rotary[rows.positions(tokens.shape[1], rotary.device)]
        elif segment_ids is not None:
            mask = segment_mask(segment_ids)
        hidden = self.decoder(hidden_states=hidden, attention_mask=mask, attention_bias=rows, rotary_pos_emb=rotary)
        if not self.post_process:
            return hidden
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        elif group.size() > 1:
            hidden = _SumGradient.apply(hidden, group)
        return hidden.transpose(0, 1)


@dataclass
class Policy:
    """The local chunks of one model and what the rooms need to know of it."""

    chunks: list[PolicyChunk]
    """One, or `virtual_pp` of them in pipeline order."""
    config: TransformerConfig
    groups: Groups
    shapes: WeightShapes
    vocab_size: int
    """Rows that mean something; `padded_vocab_size` rows are held over all tensor ranks."""
    padded_vocab_size: int
    rollout_fp8_layers: tuple[int, ...] = ()
    """Layers, from 1, whose products rollouts compute in FP8."""
    decode_graphs: bool = False
    """Rollouts replay steps of fixed shapes."""

    @property
    def output_weight(self) -> Tensor:
        """Output rows of this tensor rank, [padded_vocab / tp, H]; only on the last stage."""
        if not self.groups.is_last_stage:
            raise ValueError(f"output_weight is on the last pipeline stage; this is stage {self.groups.pp_rank}")
        return self.chunks[-1].output_layer.weight

    @property
    def vocab_offset(self) -> int:
        """Vocabulary id of the first row of `output_weight`."""
        return self.groups.tp_rank * (self.padded_vocab_size // self.groups.tp_size)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of all local chunks."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    def train(self, mode: bool = True) -> Policy:
        """Training mode (recomputation happens only there)."""
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    def eval(self) -> Policy:
        """Evaluation mode."""
        return self.train(False)

    def offload(self, to_host: bool) -> None:
        """Move a frozen model's weights to host memory, or back to its device."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError("offload moves a frozen policy; this one is trainable (build it with trainable=False)")
        target = torch.device("cpu") if to_host else self.groups.device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(target, non_blocking=True)
        if to_host:
            torch.cuda.empty_cache()


def build_policy(
    config: RunConfig,
    groups: Groups,
    vocab_size: int,
    *,
    trainable: bool = True,
    meta: bool = False,
    filled: bool = True,
) -> Policy:
    """Build the local chunks and fill them.

    Weights come from `config.model.weights` (a Hugging Face export folder) or at random from `config.seed`, the
    same whatever the layout. meta: shapes only, on torch's meta device, nothing filled. filled=False: the caller
    overwrites every weight (a checkpoint, an import), so none is drawn.
    ValueError naming the field when the layout cannot hold the model.
    """
    layout.check(config.model, config.parallel)
    padded = layout.padded_vocab(vocab_size, groups.tp_size)
    megatron = transformer_config(config, groups)
    with backend.vendor_calls(), torch.device("meta") if meta else nullcontext():
        chunks = [_chunk(config, megatron, groups, padded, index) for index in range(config.parallel.virtual_pp)]
    shapes = WeightShapes.of(config.model, vocab_size)
    in_fp8 = rollout_fp8_layers(config.precision, config.model.num_layers)
    policy = Policy(chunks, megatron, groups, shapes, vocab_size, padded, in_fp8, config.parallel.decode_graphs)
    mark_cuts(policy)
    if emulates_fp8(config.precision):
        start_emulation(policy, config.precision)
    if filled and not meta:
        _fill(policy, config)
    if not trainable:
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        policy.eval()
    return policy


def _chunk(config: RunConfig, megatron: TransformerConfig, groups: Groups, padded: int, index: int) -> PolicyChunk:
    last_index = config.parallel.virtual_pp - 1
    return PolicyChunk(
        config=megatron,
        transformer_layer_spec=block_spec(
            layout.layers_per_chunk(config.model, config.parallel), emulated_fp8=emulates_fp8(config.precision)
        ),
        vocab_size=padded,
        max_sequence_length=config.model.max_sequence_tokens,
        pre_process=groups.is_first_stage and index == 0,
        post_process=groups.is_last_stage and index == last_index,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        pg_collection=groups.pg_collection,
        vp_stage=index if last_index else None,
    )


def _fill(policy: Policy, config: RunConfig) -> None:
    import realsr_hpc

    if config.model.weights is None:
        init_weights(policy, config.seed, config.model.init_std)
        return
    root = Path(realsr_hpc.__file__).parent.parent
    load_hf_weights(policy, root / config.model.weights)
