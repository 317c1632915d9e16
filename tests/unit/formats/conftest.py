"""One process group for the room's tests, and an imported folder's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from realsr_hpc.config.schema import ParallelConfig, RunConfig
from realsr_hpc.model.policy import build_policy
from realsr_hpc.parallel.process_groups import initialise, shutdown
from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators

torch.set_num_threads(1)
declare_torchvision_operators()


@pytest.fixture(scope="package", autouse=True)
def _groups():
    initialise(ParallelConfig(), 0)
    yield
    shutdown()


@pytest.fixture
def logits_of() -> Callable[[Path, RunConfig, Tensor, int], Tensor]:
    """Logits [B, S, V] of a policy started from `model.weights=folder`."""

    def logits(folder: Path, config: RunConfig, tokens: Tensor, size: int) -> Tensor:
        started = config.model_copy(update={"model": config.model.model_copy(update={"weights": str(folder)})})
        policy = build_policy(started, initialise(ParallelConfig(), 0), size, trainable=False)
        with torch.no_grad():
            return policy.chunks[0](tokens) @ policy.output_weight.T

    return logits
