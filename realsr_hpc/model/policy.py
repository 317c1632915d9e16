"""Build a policy: its chunks by the layout, filled from a folder of weights or at random, frozen where asked."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.chunks import Policy, PolicyChunk, WeightShapes
from realsr_hpc.model.fp8 import start_emulation
from realsr_hpc.model.hf_mapping import init_weights, load_hf_weights, mark_cuts
from realsr_hpc.model.precision import emulates_fp8, rollout_fp8_layers
from realsr_hpc.model.spec import block_spec, transformer_config
from realsr_hpc.parallel import backend, layout
from realsr_hpc.parallel.groups import Groups
from realsr_hpc.paths import resolve


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
    if config.model.weights is None:
        init_weights(policy, config.seed, config.model.init_std)
        return
    load_hf_weights(policy, resolve(config.model.weights))
