"""Transformer Engine's layers hold what the local ones hold: names, shapes and keys in checkpoints.

Run as a program it needs no GPU, only an installed Transformer Engine, which it tells that there is one:

    python -m tests.gpu.test_transformer_engine
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import VOCAB, tiny_config

pytestmark = pytest.mark.gpu
Held = dict[str, tuple[Any, ...]]


def what_a_policy_holds(transformer_engine: bool) -> tuple[Held, Held]:
    """Of an unfilled policy: shapes of its parameters; whole shapes and offsets of its sharded tensors."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel import backend
    from realsr_hpc.parallel.process_groups import initialise

    if transformer_engine:
        assert backend.has_transformer_engine(), "the extra `gpu` is not installed"
    else:
        backend.has_transformer_engine = lambda: False  # type: ignore[assignment]  # this process is the test's own
    config = tiny_config(precision={"params": "bf16"})
    policy = build_policy(config, initialise(config.parallel, 0), VOCAB, filled=False)
    [chunk] = policy.chunks
    shapes = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
    parts = {name: part for name, part in chunk.sharded_state_dict().items() if isinstance(part, ShardedTensor)}
    return shapes, {name: (part.key, part.global_shape, part.global_offset) for name, part in parts.items()}


def test_names_shapes_and_sharded_keys_are_the_local_layers():
    [local], [theirs] = run_ranks(1, what_a_policy_holds, False), run_ranks(1, what_a_policy_holds, True)
    assert len(local[0]) > 20 and len(local[1]) > 20
    assert theirs == local


def without_a_gpu() -> int:
    """The same comparison on the CPU, where nothing but building is asked of the layers."""
    import torch
    import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]

    from realsr_hpc.parallel import backend

    backend.compute_on(torch.device("cpu"))
    torch.cuda.is_available = lambda: True
    backend.has_transformer_engine = lambda: True  # type: ignore[assignment]
    theirs, local = what_a_policy_holds(True), what_a_policy_holds(False)
    print(f"{len(local[0])} parameters and {len(local[1])} sharded tensors: {'equal' if theirs == local else 'differ'}")
    return int(theirs != local)


if __name__ == "__main__":
    sys.exit(without_a_gpu())
