"""A run folder of one layer at random: enough for what evaluates, restores and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from realsr_hpc import checkpoint
from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.schema import ImageTokenizerConfig, ModelConfig, RunConfig, VLCoTConfig
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.parallel.process_groups import initialise
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import save_image_tokenizer
from realsr_hpc.tokenizer.trace import TraceTokenizer

LAYER = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 48}


def random_recipe(folder: Path, **sections: Any) -> RunConfig:
    """Its image tokenizer's weights and its recipe.yaml are in `folder`."""
    image = ImageTokenizerConfig(weights=str(folder / "image.safetensors"), codebook_size=40, base_channels=32)
    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(image), folder / "image.safetensors")
    vlcot = VLCoTConfig(instruction="restore: <|image|>", max_text_tokens=4)
    fixed = {"name": "tiny", "task": "grpo", "image_tokenizer": image, "vlcot": vlcot}
    config = RunConfig(**fixed, **{"model": ModelConfig(**LAYER), **sections})
    (folder / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")
    return config


def random_checkpoint(folder: Path, config: RunConfig, step: int, scale: float = 1.0) -> Policy:
    """The policy that is saved as this step's checkpoint; scale: of its weights, so that they are not those it starts
    with. The process group is the caller's to shut down."""
    groups = initialise(config.parallel, config.seed)
    policy = build_policy(config, groups, TraceTokenizer.load(config, groups.device).codec.vocabulary.size)
    for parameter in policy.parameters():
        parameter.data.mul_(scale)
    state = checkpoint.RunState(step)
    checkpoint.save(folder / "checkpoints", step, policy, None, state, checkpoint.Keep(last=1))
    return policy
