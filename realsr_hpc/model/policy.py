"""Build a policy: its chunks for the layout, filled from a folder of weights or at random, optionally frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from realsr_hpc.config.adapters import PEFT_BASE, PEFT_PREFIX, PEFT_WEIGHTS, adapter_config, refuse_other_function
from realsr_hpc.config.schema import LoRAConfig, RunConfig
from realsr_hpc.files import check_sums, sha256_of
from realsr_hpc.formats.tensor_files import read_weights
from realsr_hpc.model import lora, whole_adapters
from realsr_hpc.model.chunks import Policy, PolicyChunk, WeightShapes
from realsr_hpc.model.fp8 import start_emulation
from realsr_hpc.model.hf_mapping import init_weights, mark_cuts
from realsr_hpc.model.precision import emulates_fp8, rollout_fp8_layers
from realsr_hpc.model.spec import block_spec, transformer_config
from realsr_hpc.model.start import load_start_weights
from realsr_hpc.parallel import backend, layout
from realsr_hpc.parallel.process_groups import ProcessGroups
from realsr_hpc.parallel.reduce import broadcast_object
from realsr_hpc.paths import resolve

BASE_NOTE = "base"
"""Key in the metadata of exported adapters: their base weights (`base_name`)."""


def build_policy(
    config: RunConfig,
    groups: ProcessGroups,
    vocab_size: int,
    *,
    trainable: bool = True,
    meta: bool = False,
    filled: bool = True,
) -> Policy:
    """Build the local chunks and fill them.

    Weights come from `config.model.weights` (a Hugging Face export folder) or are drawn from `config.seed`, equally on
    every layout. ValueError naming the field if the layout cannot hold the model.

    Args:
        config: the recipe.
        groups: process groups of its layout.
        vocab_size: number of token ids.
        trainable: False: parameters are frozen and the policy is in evaluation mode.
        meta: shapes only, on torch's meta device; nothing is filled.
        filled: False: the caller overwrites every weight (from a checkpoint or an import), so none is drawn.
    """
    layout.check(config)
    # the vocabulary is split over tp, so its rows are padded to a multiple
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
    if config.model.lora is not None:
        lora.attach(policy, config.model.lora, config.seed)
        if not meta:
            policy.base = broadcast_object(base_name(config) if groups.is_main else None, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
            if config.model.lora.weights is not None:
                folder = resolve(config.model.lora.weights)
                whole_adapters.load(policy, read_adapters(folder, config.model.lora, policy.base or ""))
    if not trainable:
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        policy.eval()
    return policy


def _chunk(
    config: RunConfig, megatron: TransformerConfig, groups: ProcessGroups, padded: int, index: int
) -> PolicyChunk:
    last_index = config.parallel.virtual_pp - 1
    return PolicyChunk(
        config=megatron,
        transformer_layer_spec=block_spec(  # pyright: ignore[reportArgumentType]
            layout.layers_per_chunk(config.model, config.parallel),
            emulated_fp8=emulates_fp8(config.precision),
            swin_norm=config.model.swin_norm,
        ),
        vocab_size=padded,
        max_sequence_length=config.model.max_sequence_tokens,
        pre_process=groups.is_first_stage and index == 0,
        post_process=groups.is_last_stage and index == last_index,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,  # pyright: ignore[reportArgumentType]
        pg_collection=groups.pg_collection,
        vp_stage=index if last_index else None,
    )


def _fill(policy: Policy, config: RunConfig) -> None:
    if config.model.weights is None:
        init_weights(policy, config.seed, config.model.init_std)
        return
    load_start_weights(policy, resolve(config.model.weights), config)


def base_name(config: RunConfig) -> str:
    """Identifies the weights that adapters are trained on, by a checksum of all files or the seed of random ones."""
    if config.model.weights is None:
        return f"random weights of seed {config.seed}"
    return weights_name(resolve(config.model.weights))


def weights_name(folder: Path) -> str:
    """One checksum over all weight files of a folder."""
    total = hashlib.sha256()
    kinds = (".safetensors", ".bin", ".pth")
    for path in sorted(path for path in folder.rglob("*") if path.suffix in kinds):
        total.update(f"{path.name} {sha256_of(path)}\n".encode())
    return f"weights of sha256 {total.hexdigest()}"


def read_adapters(folder: Path, ours: LoRAConfig, base: str) -> dict[str, torch.Tensor]:
    """Adapters of a PEFT folder by the names of `lora.parameters`.

    base: identifies the weights that they are added to (`base_name`). ValueError if the folder has no adapters, if its
    adapter_config.json describes another function than the recipe, or if they were trained on other weights.
    """
    try:
        refuse_other_function(folder, ours)
        check_sums(folder)
        tensors, notes = read_weights(folder / PEFT_WEIGHTS)
        refuse_other_base(folder, notes, base)
    except ValueError as error:
        raise ValueError(f"model.lora.weights = {folder}: {error}") from None
    return {
        name.removeprefix(PEFT_PREFIX).replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
    }


def refuse_other_base(folder: Path, notes: Mapping[str, str], base: str) -> None:
    """Raise ValueError if adapters name other weights than `base`: our exports by checksum, PEFT by a folder's name."""
    named = adapter_config(folder).get(PEFT_BASE)
    theirs = notes.get(BASE_NOTE)
    if not theirs and isinstance(named, str) and named and resolve(named).is_dir():
        theirs = weights_name(resolve(named))
    if theirs and theirs != base:
        raise ValueError(
            f"its adapters were trained on {theirs} ({PEFT_BASE} {named!r}), the recipe adds them to {base}; set "
            "model.weights to their base"
        )
