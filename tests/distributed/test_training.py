"""The training loops on real photographs: a stopped and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import NARROW, with_image_tokenizer

SMALL = [
    *NARROW,
    "rollout.grammar=constrained",
    "rollout.max_new_tokens=400",
    "checkpoint.every_steps=2",
    "optim.lr=0.001",
    "optim.warmup_steps=0",
]
GRPO = [
    "recipe=grpo_tiny",
    "grpo.num_steps=4",
    "grpo.prompts_per_step=2",
    "grpo.group_size=3",
    "grpo.updates_per_step=2",
    "grpo.heldout_every_steps=4",
    "grpo.heldout_prompts=2",
]
SFT = [
    "recipe=sft_tiny",
    "sft.num_steps=4",
    "sft.batch_size=4",
    "sft.heldout_every_steps=4",
    "sft.heldout_traces=2",
    "sft.sample_every_steps=4",
    "sft.own_codes=0.5",
]


def train(overrides: list[str], run_dir: Path, stop_after: int | None) -> tuple[int, dict[int, dict[str, float]]]:
    """Run a recipe in this process; the exit code and its metrics by step, times left out."""
    from realsr_hpc.tracking.spool import metrics_by_step
    from realsr_hpc.train import grpo, sft

    config = with_image_tokenizer(overrides, run_dir.parent)
    boundaries = iter(range(1, 100))
    loop: Any = {"grpo": grpo, "sft": sft}[config.task]
    run_dir.mkdir(exist_ok=True)
    code = loop.main(config, run_dir, lambda: next(boundaries) == stop_after)
    steps = metrics_by_step(run_dir)
    # How many tokens per pass checks changes the rounding of the sampler's own log-probabilities, nothing they decide.
    timed = ("time/", "rollout/tokens_per_", "rollout/passes", "rollout/mismatch", "system/")
    return code, {s: {k: v for k, v in m.items() if not k.startswith(timed)} for s, m in steps.items()}


@pytest.mark.parametrize("recipe", [GRPO, SFT], ids=["grpo", "sft"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(recipe, tmp_path):
    """SFT also on frozen traces, which are those that it makes on the fly."""
    overrides = [*recipe, *SMALL]
    # The whole run decodes one by one; that which is interrupted looks ahead.
    [(code, whole)] = run_ranks(1, train, [*overrides, "rollout.lookahead=1"], tmp_path / "whole", None)
    assert code == 0 and max(whole) == 4
    [(code, _)] = run_ranks(1, train, overrides, tmp_path / "parts", 2)
    assert code == 85
    [(code, parts)] = run_ranks(1, train, overrides, tmp_path / "parts", None)
    assert code == 0
    assert parts == whole
    if recipe is SFT:
        frozen = [*overrides, f"sft.traces={tmp_path / 'traces'}", "sft.sample_every_steps=0"]
        run_ranks(1, freeze, overrides, tmp_path)
        assert run_ranks(1, train, frozen, tmp_path / "frozen", 2)[0][0] == 85
        assert run_ranks(1, train, frozen, tmp_path / "frozen", None) == [(0, whole)]


def freeze(overrides: list[str], folder: Path) -> None:
    """The traces of the run's 16 samples, in files that no batch fits."""
    from realsr_hpc.data.traces import freeze_traces

    assert freeze_traces(with_image_tokenizer(overrides, folder), folder / "traces", 16, 7) == 16


def test_sft_passes_over_batches_without_captions(tmp_path):
    """One photograph of twenty has captions, and two ranks read two photographs a step each."""
    from realsr_hpc.data.manifest import read_manifest, write_manifest
    from realsr_hpc.paths import project_root

    bundled = read_manifest(project_root() / "recipes/assets/photographs/manifest.parquet")
    told = next(entry.key for entry in bundled.entries if entry.split == "train" and "/" not in entry.path)
    entries = [
        replace(entry, path=str(bundled.path(entry)), **({} if entry.key == told else dict(caption_final="")))
        for entry in bundled.entries
        if "/" not in entry.path  # twenty to train on are enough to pass over
    ]
    write_manifest(tmp_path / "manifest.parquet", entries)
    overrides = [*SFT, *SMALL, f"data.manifest={tmp_path / 'manifest.parquet'}", "cluster.tasks_per_node=2"]
    overrides += [
        "sft.num_steps=2",
        "sft.heldout_every_steps=2",
        "sft.sample_every_steps=0",
        "checkpoint.every_steps=1",
    ]
    [(code, whole), _] = run_ranks(2, train, overrides, tmp_path / "whole", None)
    assert code == 0 and all(whole[step]["sft/loss/mean"] > 1 for step in (1, 2))
    assert "heldout/loss/mean" not in whole[2]
    assert run_ranks(2, train, overrides, tmp_path / "parts", 1)[0][0] == 85
    assert run_ranks(2, train, overrides, tmp_path / "parts", None)[0] == (0, whole)


def test_grpo_runs_on_two_tensor_parallel_ranks(tmp_path):
    overrides = [*GRPO, *SMALL, "parallel.tp=2"]
    overrides += ["grpo.num_steps=1", "grpo.heldout_every_steps=1", "grpo.updates_per_step=1"]
    [(_, single)] = run_ranks(1, train, [*overrides, "parallel.tp=1"], tmp_path / "single", None)
    double = run_ranks(2, train, [*overrides, "cluster.tasks_per_node=2"], tmp_path / "double", None)[0][1]
    # Held-out images are sampled after the update, in which Adam blows up differences of rounding.
    before_update = {name: value for name, value in single[1].items() if not name.startswith("heldout/")}
    assert len(before_update) > 10
    for name, value in before_update.items():
        assert double[1][name] == pytest.approx(value, abs=1e-4), name
