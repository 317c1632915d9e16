"""Random states in checkpoints."""

from __future__ import annotations

import numpy as np
import torch

from realsr_hpc.checkpoint.loading import random_states, set_random_states
from realsr_hpc.parallel import backend


def test_those_of_another_kind_of_device_start_anew():
    """A CPU generator's state has 5,056 bytes, a GPU's 16; neither can load the other's."""
    backend.prepare()
    states = random_states() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    drawn = torch.rand(3), np.random.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), drawn[0]) and np.array_equal(np.random.rand(3), drawn[1])
