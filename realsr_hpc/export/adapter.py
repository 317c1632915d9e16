"""Writes trained adapters in the format of `peft`: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from realsr_hpc.config.adapters import PEFT_BASE, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.export.weight_files import Aside, write_json
from realsr_hpc.files import as_other_files, write_sums
from realsr_hpc.model.policy import BASE_NOTE, Policy
from realsr_hpc.model.whole_adapters import whole_tensors


def export_adapter(policy: Policy, config: RunConfig, output: Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapters to the folder `output`. Collective: every rank calls it, world rank 0 writes.

    dtype: round the adapters to it; None keeps their dtype.

    Raises:
        ValueError: if the policy has no adapters, or `output` exists.
    """
    lora = config.model.lora
    if lora is None:
        raise ValueError("form=peft: this run trained no adapters (model.lora is null); leave form out")
    tensors = {
        f"{PEFT_PREFIX}{name}": tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in whole_tensors(policy)
        if tensor is not None
    }
    if policy.groups.is_main:
        with Aside(output) as folder:
            save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt", BASE_NOTE: policy.base or ""})
            as_other_files(folder / PEFT_WEIGHTS)
            write_json(
                folder / PEFT_CONFIG,
                {
                    "peft_type": "LORA",
                    "task_type": "CAUSAL_LM",
                    PEFT_BASE: config.model.weights,
                    "r": lora.rank,
                    "lora_alpha": lora.alpha,
                    "lora_dropout": 0.0,
                    "target_modules": list(lora.targets),
                    "bias": "none",
                    "fan_in_fan_out": False,
                    "inference_mode": True,
                    "init_lora_weights": True,
                },
            )
            write_sums(folder)
    if dist.is_initialized():
        dist.barrier()
