"""Random weights and gathering do not depend on the layout; reductions over groups."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import VOCAB, largest_difference, tiny_config


def gathered(config: Any, vocab_size: int) -> dict[str, Any]:
    from realsr_hpc.model.hf_mapping import local_to_hf
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.process_groups import initialise

    policy = build_policy(config, initialise(config.parallel, config.seed), vocab_size)
    return {name: tensor.numpy() for name, tensor in local_to_hf(policy).items()}


@pytest.mark.parametrize("vocab_size", [VOCAB, VOCAB - 1])
@pytest.mark.parametrize(("world", "parallel"), [(4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "virtual_pp": 2})])
def test_random_weights_are_the_same_everywhere(world: int, parallel: dict[str, Any], vocab_size: int) -> None:
    reference = run_ranks(1, gathered, tiny_config(), vocab_size)[0]
    results = run_ranks(world, gathered, tiny_config(parallel), vocab_size)
    assert reference["lm_head.weight"].shape == (vocab_size, 64)
    assert largest_difference(results[0], reference) == 0.0
    assert all(other == {} for other in results[1:])


def reductions() -> list[Any]:
    import torch.distributed as dist

    from realsr_hpc.parallel import reduce
    from realsr_hpc.parallel.process_groups import initialise

    groups = initialise(tiny_config({"pp": 2}).parallel, 0)
    rank, world, device = float(groups.world_rank), dist.group.WORLD, groups.device
    values = {"b": rank, "a": 10.0} if groups.is_main else {"a": 10.0, "b": rank}
    return [
        (groups.pp_rank, groups.dp_rank, groups.is_first_stage, groups.is_last_stage, groups.is_main),
        reduce.reduce_floats(values, world, device),
        reduce.reduce_float(rank, groups.dp, device, "sum"),
        reduce.reduce_float(rank, world, device, "max"),
        reduce.broadcast_from_last_stage(groups.world_rank, groups),
        reduce.gather_objects(groups.world_rank, groups.dp),
    ]


def test_reductions_on_two_stages_and_two_replicas() -> None:
    results = run_ranks(4, reductions)
    assert [r[0][:2] for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert results[0][0][2:] == (True, False, True) and results[3][0][2:] == (False, True, False)
    assert all(r[1] == {"a": 10.0, "b": 1.5} for r in results)
    assert [r[2] for r in results] == [1.0, 1.0, 5.0, 5.0]
    assert all(r[3] == 3.0 for r in results)
    assert [r[4] for r in results] == [2, 3, 2, 3]
    assert [r[5] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def fail_on_rank_one() -> None:
    import os

    if os.environ["RANK"] == "1":
        raise RuntimeError("deliberate")


def test_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="rank 1 failed:(.|\n)*deliberate"):
        run_ranks(2, fail_on_rank_one)
