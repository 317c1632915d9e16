"""Number formats: PrecisionConfig -> keywords of Megatron's TransformerConfig."""

from __future__ import annotations

from typing import Any  # keywords of Megatron's TransformerConfig

import torch

from realsr_hpc.config.schema import PrecisionConfig
from realsr_hpc.parallel import backend

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def params_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Number format of weights and activations."""
    return _DTYPES[precision.params]


def precision_arguments(precision: PrecisionConfig, num_layers: int) -> dict[str, Any]:
    """Keywords for TransformerConfig.

    ValueError if FP8 is requested without Transformer Engine (Megatron would ignore it silently) or without
    bf16 parameters.
    """
    dtype = params_dtype(precision)
    arguments: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
    }
    if precision.fp8 == "none" or emulates_fp8(precision):
        return arguments  # Megatron's own FP8 paths need Transformer Engine: fp8.py emulates outside of them
    _check_fp8(precision)
    return arguments | fp8_arguments(precision, num_layers)


def emulates_fp8(precision: PrecisionConfig) -> bool:
    """Whether model/fp8.py emulates FP8 numerics, without Transformer Engine."""
    return precision.fp8 != "none" and precision.fp8_backend == "emulated"


def keeps_ends_in_bf16(precision: PrecisionConfig, num_layers: int) -> bool:
    """Whether the first and last layer stay in bf16. Delayed scaling applies to the whole block, so it keeps none."""
    return precision.first_last_layers_bf16 and precision.fp8 != "delayed" and num_layers > 2


def rollout_fp8_layers(precision: PrecisionConfig, num_layers: int) -> tuple[int, ...]:
    """Layers, from 1, whose products rollouts compute in FP8: all, or all but the ends; () without rollout_fp8."""
    if not precision.rollout_fp8:
        return ()
    skipped = 1 if precision.first_last_layers_bf16 and num_layers > 2 else 0
    return tuple(range(1 + skipped, num_layers + 1 - skipped))


def fp8_arguments(precision: PrecisionConfig, num_layers: int) -> dict[str, Any]:
    """The FP8 part of the keywords, for Transformer Engine."""
    keep_ends = keeps_ends_in_bf16(precision, num_layers)
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8,
        "first_last_layers_bf16": keep_ends,
        "num_layers_at_start_in_bf16": 1 if keep_ends else 0,
        "num_layers_at_end_in_bf16": 1 if keep_ends else 0,
    }


def _check_fp8(precision: PrecisionConfig) -> None:
    if not backend.has_transformer_engine():
        raise ValueError(
            f"precision.fp8 = {precision.fp8!r} needs CUDA and Transformer Engine, and one of them is absent here: "
            "install the extra `gpu` on a GPU node, set precision.fp8=none, or precision.fp8_backend=emulated to see "
            "what FP8 does to the numbers"
        )
    if precision.params != "bf16":
        raise ValueError(
            f"precision.fp8 = {precision.fp8!r} needs precision.params = bf16, not {precision.params}: set it to bf16"
        )
