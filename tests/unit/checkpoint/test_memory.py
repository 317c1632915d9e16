"""How much memory, in addition to the weights, writing and opening a checkpoint allocate."""

from __future__ import annotations

from pathlib import Path

import torch

from realsr_hpc import checkpoint
from realsr_hpc.config.load import compose_one
from realsr_hpc.model.policy import build_policy
from realsr_hpc.parallel.process_groups import initialise, shutdown
from tools.benchmarks._allocations import Allocations


def test_no_parameter_is_held_twice_while_a_checkpoint_is_written_or_loaded(tmp_path: Path) -> None:
    """Gate and up projections, half of these weights, are stored separately; once all layers were joined together."""
    sizes = ["model.num_layers=8", "model.hidden_size=64", "model.num_heads=4", "model.ffn_hidden_size=2048"]
    config = compose_one(["recipe=sft_tiny", "data=bundled", "cluster.tasks_per_node=1", *sizes])
    groups = initialise(config.parallel, config.seed)
    try:
        kept = build_policy(config, groups, 512)
        other = build_policy(config.model_copy(update={"seed": config.seed + 1}), groups, 512)
        state = checkpoint.RunState(0)
        with Allocations() as written:
            path = checkpoint.save(tmp_path, 0, kept, None, state, checkpoint.Keep(last=1))
        with Allocations() as seen:
            checkpoint.load(path, other, None, groups)
    finally:
        shutdown()
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), other.parameters(), strict=True))
    weights = sum(parameter.nbytes for parameter in other.parameters())
    assert max(written.peak, seen.peak) < 0.25 * weights, (written.peak / weights, seen.peak / weights)
