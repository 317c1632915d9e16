"""The small policy and transformers' copy of it, made from one set of weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.config.load import RecipeError, compose
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.parallel.process_groups import ProcessGroups, initialise
from realsr_hpc.tokenizer.trace import TraceTokenizer


def compose_or_none(overrides: list[str], tokens: int) -> RunConfig | None:
    """The recipe grpo_tiny in one process with these overrides and rollouts of `tokens`; its faults are printed."""
    try:
        config = compose(["recipe=grpo_tiny", "cluster.tasks_per_node=1", *overrides])
    except RecipeError as error:
        print(error, file=sys.stderr)
        return None
    assert isinstance(config, RunConfig), "no overrides make a sweep here"
    # past the check that a rollout can hold three images: here it is cut off on purpose
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": tokens})})


def our_policy(config: RunConfig) -> tuple[ProcessGroups, TraceTokenizer, Policy]:
    """Groups of one process on one core, tokenizers, and the trainable policy."""
    torch.set_num_threads(1)
    groups = initialise(config.parallel, config.seed)
    tokens = TraceTokenizer.load(config, groups.device)
    return groups, tokens, build_policy(config, groups, tokens.codec.vocabulary.size)


def transformers_copy(policy: Policy, config: RunConfig, tokens: TraceTokenizer, folder: Path) -> Any:
    """The policy's Hugging Face export in `folder`, loaded as a stranger would."""
    from realsr_hpc.export import export_policy
    from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators

    declare_torchvision_operators()  # a torchvision for CUDA may stand beside a torch for CPUs
    from transformers import AutoModelForCausalLM

    export_policy(policy, config, tokens, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    return model.eval()


def some_prompts(tokens: TraceTokenizer, count: int, length: int = 0) -> Tensor:
    """Prompts of random LQ images, int64 [count, P]; repeated or cut to `length` tokens, if one is given.

    Any tokens do where only time is measured: what a step costs depends on their number alone.
    """
    codec = tokens.codec
    side = codec.side(codec.config.lq_size_px)
    grids = np.random.default_rng(0).integers(0, codec.vocabulary.num_codes, (count, side, side))
    prompts = torch.tensor([codec.prompt(grid) for grid in grids])
    return prompts.repeat(1, length // prompts.shape[1] + 1)[:, :length] if length else prompts
