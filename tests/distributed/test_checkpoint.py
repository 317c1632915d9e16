"""Checkpoints: bitwise resumption, other layouts, damaged folders."""

from __future__ import annotations

import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import largest_difference, loss_of, microbatches, start, tiny_config, trained

OPTIM = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 4, "schedule": "cosine"}
STEPS = 6


def train(
    config: Any, root: Path, steps: int, save_at: int | None, resume: bool, behind: bool = False
) -> dict[str, Any]:
    """Train to `steps`, perhaps from the newest checkpoint; weights, norms and a draw of every generator."""
    from realsr_hpc.checkpoint import Keep, RunState, Saver, load, resume_path
    from realsr_hpc.optim.step import Optimiser

    policy = start(config)
    groups = policy.groups
    optimiser = Optimiser(policy, config, total_steps=STEPS)
    done = 0
    random.seed(groups.world_rank)
    np.random.seed(groups.world_rank)
    torch.manual_seed(groups.world_rank)
    if resume:
        for parameter in policy.parameters():
            if parameter.requires_grad:  # adapters' checkpoints hold no weights
                parameter.data.fill_(7.0)
        path = resume_path(root, groups)
        assert path is not None
        done = load(path, policy, optimiser, groups).step
    data = microbatches(2, groups.dp_rank, groups.dp_size)
    norms = []
    saver = Saver(root, Keep(last=2), behind=behind)
    for step in range(done, steps):
        norms.append(optimiser.step(data, loss_of(policy)).grad_norm)
        random.random(), np.random.random(), torch.rand(1)
        if step + 1 == save_at:
            saver.start(save_at, policy, optimiser, RunState(save_at), None)
            if not behind:
                saver.complete()
    if saver.pending:  # written behind the remaining steps, which changed the weights
        saver.complete()
    return {
        "norms": norms,
        "draws": (random.random(), float(np.random.random()), float(torch.rand(1))),
        "weights": trained(policy),
    }


@pytest.mark.parametrize(("distributed_optimizer", "behind"), [(False, False), (True, True)])
def test_resumed_run_is_bitwise_the_same(tmp_path: Path, distributed_optimizer: bool, behind: bool) -> None:
    config = tiny_config({"distributed_optimizer": distributed_optimizer}, optim=OPTIM)
    whole = run_ranks(2, train, config, tmp_path, STEPS, 3, False, behind)
    resumed = run_ranks(2, train, config, tmp_path, STEPS, None, True)
    for before, after in zip(whole, resumed, strict=True):
        assert after["norms"] == before["norms"][3:]
        assert after["draws"] == before["draws"]
    assert whole[0]["draws"] != whole[1]["draws"]
    assert largest_difference(resumed[0]["weights"], whole[0]["weights"]) == 0.0


def test_data_parallel_ranks_share_the_writing(tmp_path: Path) -> None:
    """Ranks that hold the same write halves of it, not rank 0 everything."""
    config = tiny_config({"distributed_optimizer": True}, optim=OPTIM)
    run_ranks(2, train, config, tmp_path, 1, 1, False)
    shards = list((tmp_path / "step-000001").glob("*.distcp"))
    written = [sum(path.stat().st_size for path in shards if path.name.startswith(f"__{rank}_")) for rank in (0, 1)]
    assert min(written) > 0.8 * max(written)


@pytest.fixture(scope="module")
def tensor_parallel_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run on tp 2 x dp 2 that saved at step 3: its folder and what world rank 0 had."""
    root = tmp_path_factory.mktemp("tp2")
    config = tiny_config({"tp": 2, "distributed_optimizer": True}, optim=OPTIM)
    return root, run_ranks(4, train, config, root, STEPS, 3, False)[0]


@pytest.mark.parametrize(
    ("world", "parallel"), [(2, {"pp": 2}), (4, {"tp": 2, "pp": 2}), (1, {}), (2, {"pp": 2, "virtual_pp": 2})]
)
def test_resumes_on_another_layout(
    tensor_parallel_run: tuple[Path, dict[str, Any]], world: int, parallel: dict[str, Any]
) -> None:
    root, whole = tensor_parallel_run
    other = tiny_config(parallel | {"distributed_optimizer": True}, optim=OPTIM)
    resumed = run_ranks(world, train, other, root, STEPS, None, True)
    assert resumed[0]["norms"] == pytest.approx(whole["norms"][3:], rel=1e-4)
    assert largest_difference(resumed[0]["weights"], whole["weights"]) < 1e-4


def save_on_a_full_disk(config: Any, root: Path, limits: list[tuple[int, int]]) -> dict[str, Any]:
    """Save under each (rank, bytes) limit of that rank's files, then without; what each save came to."""
    from realsr_hpc.checkpoint import Keep, NotSaved, RunState, Saver, latest
    from realsr_hpc.optim.step import Optimiser

    policy = start(config)
    optimiser = Optimiser(policy, config, total_steps=STEPS)
    optimiser.step(microbatches(2, policy.groups.dp_rank, policy.groups.dp_size), loss_of(policy))
    said, newest = [], []
    for step, (rank, size) in enumerate([*limits, (-1, 0)], 1):
        saver = Saver(root, Keep(last=2), behind=step % 2 == 0)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if rank == policy.groups.world_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            saver.start(step, policy, optimiser, RunState(step), None)
            saver.complete()
            said.append("saved")
        except NotSaved as error:
            said.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        newest.append(getattr(latest(root), "name", None))
    return {"said": said, "newest": newest, "left": sorted(path.name for path in root.iterdir())}


def test_what_one_rank_cannot_write_is_said_by_all_and_leaves_no_trace(tmp_path: Path) -> None:
    """A file-size limit stands for a quota; by its size the kernel refuses the reserve, a shard, or nothing."""
    config = tiny_config({"distributed_optimizer": True}, optim=OPTIM)
    none, small, shard = (-1, 0), 1 << 20, 1 << 12
    for result in run_ranks(2, save_on_a_full_disk, config, tmp_path, [none, (0, small), (1, shard), (1, shard)]):
        saved, reserve, *shards, again = result["said"]
        assert (saved, again) == ("saved", "saved")
        assert "rank 0: OSError" in reserve and "File too large" in reserve
        assert all("rank 1: OSError" in text and "File too large" in text for text in shards)
        assert result["newest"] == ["step-000001"] * 4 + ["step-000005"]
        assert result["left"] == ["step-000001", "step-000005"]
