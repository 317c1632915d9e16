"""FP8 in whole runs, emulated: the gate before a run and during it, falling back, stopping, resuming, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.test_checkpoint import OPTIM, STEPS
from tests.distributed.test_checkpoint import train as train_steps
from tests.distributed.test_training import SFT, SMALL, train
from tests.distributed.worlds import largest_difference, tiny_config

RUN = [*SFT, *SMALL, "model.num_layers=3", "sft.num_steps=3", "sft.sample_every_steps=0", "checkpoint.every_steps=1"]
FP8 = ["precision.fp8=tensorwise", "precision.fp8_backend=emulated", "precision.fp8_gate_every_steps=2"]
DIFFERENCE, ON = "fp8/logprob_difference/mean", "fp8/on/step"


def without_gate(steps: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {k: v for k, v in m.items() if not k.startswith("fp8/")} for step, m in steps.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    [(code, steps)] = run_ranks(1, train, RUN, tmp_path_factory.mktemp("plain") / "run", None)
    assert code == 0
    return steps


def test_an_open_gate_measures_and_training_is_in_fp8(tmp_path: Path, plain: dict[int, dict[str, float]]) -> None:
    [(code, steps)] = run_ranks(1, train, [*RUN, *FP8], tmp_path / "run", None)
    assert code == 0
    assert DIFFERENCE not in steps[1] and 1e-5 < steps[2][DIFFERENCE] < 0.1 and steps[2][ON] == 1.0
    assert without_gate(steps)[1]["sft/loss/mean"] != plain[1]["sft/loss/mean"]


def test_a_closed_gate_goes_on_in_bf16_and_stays_there_when_resumed(
    tmp_path: Path, plain: dict[int, dict[str, float]]
) -> None:
    """The gate closes before the first step: what follows is the run without FP8, bit for bit."""
    narrow = [*RUN, *FP8, "precision.fp8_gate_logprob=1e-9"]
    [(code, _)] = run_ranks(1, train, narrow, tmp_path / "run", 1)
    assert code == 85
    # wide from here on: were the fallback not remembered, the gate would let FP8 in again
    wide = [*RUN, *FP8, "precision.fp8_gate_logprob=10"]
    [(code, steps)] = run_ranks(1, train, wide, tmp_path / "run", None)
    assert code == 0 and [steps[step][ON] for step in (2, 3)] == [0.0, 0.0]
    assert without_gate(steps) == plain


def test_a_closed_gate_stops_the_run_where_asked(tmp_path: Path) -> None:
    strict = [*RUN, *FP8, "precision.fp8_gate_logprob=1e-9", "precision.fp8_gate_action=stop"]
    with pytest.raises(AssertionError, match="above precision.fp8_gate_logprob=1e-09: set precision.fp8=none"):
        run_ranks(1, train, strict, tmp_path / "run", None)


def test_two_pipeline_stages_see_the_same_difference(tmp_path: Path) -> None:
    """The last stage alone has log-probabilities; both must come to one decision."""
    one = run_ranks(1, train, [*RUN, *FP8, "model.num_layers=4", "sft.num_steps=2"], tmp_path / "one", None)[0][1]
    two = [*RUN, *FP8, "model.num_layers=4", "sft.num_steps=2", "parallel.pp=2", "cluster.tasks_per_node=2"]
    both = run_ranks(2, train, two, tmp_path / "two", None)[0][1]
    assert both[2][DIFFERENCE] == pytest.approx(one[2][DIFFERENCE], rel=0.05)


def train_with_norms_that_have_a_state(*arguments: Any) -> dict[str, Any]:
    """As Transformer Engine's norms, which write an `_extra_state` and ask for one, though it is empty."""
    import torch

    from realsr_hpc.model import spec

    class Norm(spec.RMSNorm):
        def get_extra_state(self) -> torch.Tensor:
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state: torch.Tensor | None) -> None:
            assert state is None or not state.numel()

    spec.RMSNorm = Norm
    return train_steps(*arguments)


def test_checkpoints_pass_between_norms_with_and_without_a_state(tmp_path: Path) -> None:
    """What was written without Transformer Engine (an import, a CPU run) goes on with it, and back."""
    config = tiny_config({"tp": 2, "distributed_optimizer": True}, optim=OPTIM)
    whole = run_ranks(2, train_steps, config, tmp_path, STEPS, 3, False)
    there = run_ranks(2, train_with_norms_that_have_a_state, config, tmp_path, STEPS, 5, True)
    back = run_ranks(2, train_steps, config, tmp_path, STEPS, None, True)
    assert [rank["norms"] for rank in there] == [rank["norms"][3:] for rank in whole]
    assert [rank["norms"] for rank in back] == [rank["norms"][5:] for rank in whole]


def test_delayed_scales_resume_bitwise_from_a_checkpoint(tmp_path: Path) -> None:
    precision: dict[str, Any] = {"fp8": "delayed", "fp8_backend": "emulated"}
    config = tiny_config({"tp": 2, "distributed_optimizer": True}, optim=OPTIM, precision=precision)
    whole = run_ranks(2, train_steps, config, tmp_path, STEPS, 3, False)
    resumed = run_ranks(2, train_steps, config, tmp_path, STEPS, None, True)
    assert [rank["norms"] for rank in resumed] == [rank["norms"][3:] for rank in whole]
    assert largest_difference(resumed[0]["weights"], whole[0]["weights"]) == 0.0
    # the scales matter: without them the first step after the checkpoint would differ
    plain = tiny_config({"tp": 2, "distributed_optimizer": True}, optim=OPTIM)
    other = run_ranks(2, train_steps, plain, tmp_path, STEPS, None, True)
    assert other[0]["norms"] != resumed[0]["norms"]
