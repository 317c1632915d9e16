"""Checks that PEFT adapters from which a recipe starts compute the same function as the recipe's `model.lora`.

Only adapter_config.json is read, so that launching can check it; tensors are compared when the policy is filled.
"""

from __future__ import annotations

from pathlib import Path

from realsr_hpc.config.schema import LoRAConfig
from realsr_hpc.files import parse_json

PEFT_WEIGHTS, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
"""File of PEFT's adapters, and PEFT's prefix of the model's module names."""
PEFT_CONFIG = "adapter_config.json"
PEFT_BASE = "base_model_name_or_path"
_SAME_FUNCTION = {
    "auto_mapping", PEFT_BASE, "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Fields that do not change y = W x + (alpha / r) B A x; the tensors show which projections have adapters.

Any other field that is set is a variant of LoRA, also a field of a later release.
"""
_BASE_KEPT = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave W unchanged; those of PiSSA, OLoRA and similar methods subtract a part from it."""


def adapter_config(folder: Path) -> dict[str, object]:
    """The adapter_config.json of a PEFT folder. ValueError if a file is missing or unreadable."""
    if not (folder / PEFT_WEIGHTS).is_file() or not (folder / PEFT_CONFIG).is_file():
        raise ValueError(f"no {PEFT_WEIGHTS} with {PEFT_CONFIG}: name a PEFT folder")
    try:
        return parse_json((folder / PEFT_CONFIG).read_bytes(), dict[str, object])
    except ValueError as error:
        raise ValueError(f"{PEFT_CONFIG}: {error}") from None


def refuse_other_function(folder: Path, lora: LoRAConfig) -> None:
    """ValueError naming every field in which a PEFT folder's function differs from the recipe's `model.lora`."""
    stored = adapter_config(folder)
    wanted = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none"}
    numbers = [name for name, value in wanted.items() if stored.get(name) != value]
    variants = [name for name, value in stored.items() if value and name not in wanted | dict.fromkeys(_SAME_FUNCTION)]
    if stored.get("init_lora_weights") not in _BASE_KEPT:
        variants.append("init_lora_weights")
    if numbers or variants:
        differing = ", ".join(f"{name} {stored.get(name)!r}" for name in [*numbers, *variants])
        raise ValueError(
            f"{PEFT_CONFIG} has {differing}; set model.lora.rank and alpha to the adapter's; its variants of LoRA, "
            "if any, cannot be represented"
        )
