"""Which groups of which steps are saved for inspection; each image and number belongs to its own rollout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from realsr_hpc import runfolder
from realsr_hpc.artifacts import rollouts
from realsr_hpc.config.operation import TrackingConfig
from realsr_hpc.records import StepReport
from realsr_hpc.train.experience import collect
from realsr_hpc.train.kept_rollouts import keep_rollouts
from tests.steps import Images, small_parts

torch.set_num_threads(1)


def test_the_first_groups_of_due_steps_are_kept_with_all_their_images(tmp_path: Path):
    parts = small_parts(weight={"weight": 2.0})
    groups = collect(parts, Images([0, 1]))
    truth = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    groups[0] = replace(groups[0], source=replace(groups[0].source, gt=truth))
    tracking = TrackingConfig(rollouts_every_steps=4, rollouts_groups=1)
    run = SimpleNamespace(
        config=SimpleNamespace(tracking=tracking), parts=parts, num_steps=7, run_dir=tmp_path / "run-1"
    )
    for number in range(1, 8):
        keep_rollouts(run, "train", StepReport(number, {}, tuple(groups)))
    folders = [runfolder.rollouts(run.run_dir, step, "train") for step in (1, 4, 7)]
    assert runfolder.all_rollouts(run.run_dir) == folders
    kept = rollouts.read(folders[1])
    assert (kept.run, kept.step, kept.kind) == ("run-1", 4, "train") and len(kept.groups) == 1
    [group], scored = kept.groups, groups[0]
    assert (group.key, group.weights, set(group.files)) == ("0", {"told": 2.0}, {"input", "truth"})

    def saved(file: str) -> np.ndarray:
        with Image.open(folders[1] / file) as image:
            return np.asarray(image)

    np.testing.assert_array_equal(saved(group.files["input"]), scored.source.lq)
    np.testing.assert_array_equal(saved(group.files["truth"]), truth)
    for member, rollout in enumerate(group.rollouts):
        decoded = parts.tokens.decode(scored.traces[member].images)
        for name, image in zip(("rough", "middle", "final"), decoded, strict=True):
            difference = saved(rollout.files[name]).astype(int) - image
            assert np.abs(difference).max() <= 1, name  # of a batch of another size
        assert rollout.rewards == {"told": float(scored.rewards.breakdown["told"][member])}
        assert rollout.reward == float(scored.rewards.total[member]) == 2 * rollout.rewards["told"]
        assert rollout.advantage == float(scored.advantages[member])
        assert rollout.texts == scored.traces[member].texts
    assert len(group.rollouts) == 4 and len({rollout.advantage for rollout in group.rollouts}) == 4
