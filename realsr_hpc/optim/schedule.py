"""Learning rate by step: linear warm-up, then constant, linear or cosine decay to `min_lr`. Pure arithmetic."""

from __future__ import annotations

import math

from realsr_hpc.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of update `step` (0-based) of `total_steps`; the first warm-up step is already above zero."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    decay_steps = max(1, total_steps - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / decay_steps)
    remaining = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining
