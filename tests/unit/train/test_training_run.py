"""The run around a training loop: when it saves, stops and continues, and what it records of skipped updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realsr_hpc import checkpoint
from realsr_hpc.config.schema import ParallelConfig
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import StepReport
from realsr_hpc.train import skipped
from realsr_hpc.train.kept_steps import KeptStep
from realsr_hpc.train.skipped import keep_skipped
from realsr_hpc.train.training_run import TrainingRun
from tests.steps import small_parts

torch.set_num_threads(1)


@dataclass
class Place:
    """A loader's position."""

    number: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


@pytest.fixture
def begun():
    """(folder, number of steps, asked to stop?, **checkpoint section) -> a run in the folder, closed at the end."""
    runs: list[TrainingRun] = []

    def begin(folder: Path, num_steps: int, stop=lambda: False, sections=None, **checkpoints) -> TrainingRun:
        parts = small_parts(checkpoint=checkpoints, **(sections or {}))
        runs.append(TrainingRun(parts, folder / "run", stop, num_steps))
        return runs[-1]

    yield begin
    for run in runs:
        run.tracker.close("FINISHED")


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (folder / "run" / "checkpoints").glob("step-*"))


def test_a_run_saves_where_it_is_due_and_stops_where_it_is_told(begun, tmp_path: Path):
    """It saves every second step, at `stop_at_step`, and at the end, which does not count as a stop."""
    run = begun(tmp_path / "a", 9, every_steps=2, stop_at_step=5, keep_last=9)
    assert [run.must_stop(step, Place()) for step in (1, 2, 3, 4, 5)] == [False] * 4 + [True]
    assert saved(tmp_path / "a") == [2, 4, 5]
    run = begun(tmp_path / "b", 3, every_steps=100, stop_at_step=3, keep_last=9)
    assert not any(run.must_stop(step, Place()) for step in (1, 2, 3))
    assert saved(tmp_path / "b") == [3]
    run = begun(tmp_path / "d", 2, every_steps=100)
    assert not any(run.must_stop(step, Place()) for step in (1, 2)) and saved(tmp_path / "d") == [2]
    asked = iter([False, True])
    run = begun(tmp_path / "c", 9, lambda: next(asked), every_steps=100)
    assert [run.must_stop(step, Place()) for step in (1, 2)] == [False, True]
    assert saved(tmp_path / "c") == [2]


def occupied(folder: Path, step: int) -> Path:
    """A file at the path where this step's checkpoint would first be written, so that saving fails."""
    (root := folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (path := root / f".tmp-step-{step:06d}").touch()
    return path


def test_training_goes_on_after_a_checkpoint_that_failed_until_too_many_fail_in_a_row(begun, tmp_path: Path):
    run = begun(tmp_path, 9, every_steps=1, max_failed_in_a_row=2, keep_last=9)
    told = []
    run.tracker.log_metrics = lambda step, values: told.append(values.get("checkpoint/not_saved/count"))
    for step in (1, 2, 3, 4):
        path = occupied(tmp_path, step) if step in (2, 4) else None
        assert not run.must_stop(step, Place())
        told.clear()
        run.report(StepReport(step, {}), "")
        assert told == [1.0 if path else None]
        if path:
            path.unlink()
    assert saved(tmp_path) == [1, 3]
    occupied(tmp_path, 5)
    with pytest.raises(checkpoint.NotSaved):
        run.must_stop(5, Place())


def test_the_last_checkpoint_must_be_written(begun, tmp_path: Path):
    run = begun(tmp_path, 1, max_failed_in_a_row=9)
    occupied(tmp_path, 1)
    with pytest.raises(checkpoint.NotSaved):
        run.must_stop(1, Place())


@pytest.mark.parametrize(("distributed", "params"), [(False, "fp32"), (False, "bf16"), (True, "fp32")])
def test_a_run_without_an_update_goes_on_with_its_counters_place_and_a_fresh_optimizer(
    begun, tmp_path, distributed, params
):
    """Every group was dropped: Adam has no states yet. The next update is the first in both runs."""
    batches = [Microbatch(torch.full((1, 8), 3))]
    sections = {"parallel": {"distributed_optimizer": distributed}, "precision": {"params": params}}
    run = begun(tmp_path, 9, sections=sections, every_steps=1)
    run.parts.optimiser.num_updates, run.parts.optimiser.num_skipped = 7, 3
    run.counters["told"] = 5
    run.must_stop(4, Place(11))
    again, place = begun(tmp_path, 9, sections=sections), Place()
    assert again.resume(place) == 4 and place.number == 11 and again.counters == {"told": 5}
    assert (again.parts.optimiser.num_updates, again.parts.optimiser.num_skipped) == (7, 3)
    told: dict[str, float] = {}
    again.tracker.log_metrics = lambda step, values: told.update(values)
    again.report(StepReport(5, {}), "")
    assert told["optim/skipped_updates/count"] == 3.0
    before = [parameter.detach().clone() for parameter in run.parts.policy.parameters()]
    for one in (run, again):
        assert one.parts.optimiser.step(batches, lambda hidden, weight, _: (hidden.square().mean(), {})).applied
    pairs = list(zip(run.parts.policy.parameters(), again.parts.policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    # Adam's first update moves a weight by the rate, whatever its gradient; bf16 rounds
    moved = max(float((a - b).detach().abs().max()) for (a, _), b in zip(pairs, before, strict=True))
    assert 0.9 < moved / run.parts.optimiser.vendor.param_groups[0]["lr"] < 2
    assert begun(tmp_path / "other", 9).resume(place) == 0


def test_batches_of_skipped_updates_are_kept_up_to_a_number_and_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(skipped, "MAX_KEPT", 3)
    optimiser = small_parts().optimiser
    keep_skipped(tmp_path, optimiser, limit=3)
    batches = [Microbatch(torch.full((1, 8), number)) for number in range(2)]

    def update(factor: float) -> None:
        optimiser.step(batches, lambda hidden, weight, _: (hidden.sum() * weight.sum() * factor, {}))

    for factor in (torch.nan, torch.nan, 1e-9, torch.nan, torch.nan):
        update(factor)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["update-000001", "update-000002", "update-000004"]
    kept = load_file(tmp_path / "update-000002" / "dp-0.safetensors")
    assert torch.equal(kept["0.tokens"], batches[0].tokens) and torch.equal(kept["1.tokens"], batches[1].tokens)
    with pytest.raises(RuntimeError, match="optim.max_skipped_in_a_row: 3"):
        update(torch.nan)


@pytest.mark.parametrize("shares", [["abc", "def"], ["abcdef"], ["ab", "cd", "ef"], list("abcdef")])
def test_a_kept_step_is_shared_by_any_number_of_ranks(shares):
    kept = KeptStep(1, {}, (tuple("abc"), tuple("def")), ParallelConfig())
    assert ["".join(kept.share(rank, len(shares))) for rank in range(len(shares))] == shares


def test_each_rank_of_the_first_layout_has_its_own_groups():
    """Also if their numbers differ."""
    kept = KeptStep(1, {}, (tuple("abc"), tuple("d")), None)
    assert [kept.share(rank, 2) for rank in range(2)] == [["a", "b", "c"], ["d"]]
