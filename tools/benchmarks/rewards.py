"""Rewards a second, in batches against one at a time: every reward of a recipe, on one core.

    python tools/bench.py rewards [rollouts=64] [side=128] [rounds=5] [rewards=NAME] [section.field=value ...]

Candidates are degraded versions of the bundled photographs with true traces; batched is one call of the mixture's term
over all of them, one at a time is what the released code of the paper does. CPU time, medians, in turns. Scores of both
ways are compared: the largest difference is the last column.
"""

from __future__ import annotations

import numpy as np
import torch

from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.data.decoding import decode_image
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.paths import project_root
from realsr_hpc.quality.ladder import ladder
from realsr_hpc.records import Candidate, DegradationLabel, ParsedTrace
from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.mixture import build_reward
from tools.benchmarks._measure import alternately, show

LABEL = DegradationLabel("light", "downsample", "medium", "light", "upsample")


def main(arguments: list[str]) -> int:
    """Exit code 2 for a wrong recipe."""
    given, overrides = read_with_overrides(arguments, {"rollouts": "64", "side": "128", "rounds": "5"}, __doc__)
    options = read_counts(given, given)
    torch.set_num_threads(1)
    try:
        config = compose_one(["recipe=grpo_tiny", *overrides])
    except RecipeError as error:
        print(error)
        return 2
    candidates = some_candidates(options["rollouts"], options["side"])
    rows = []
    for name, term in config.rewards.terms.items():
        rows.append(measured(name, build_reward(name, term), candidates, options["rounds"]))
    columns = ("reward", "batched, rollouts/s", "one at a time, rollouts/s", "gain", "largest difference")
    show(f"{options['rollouts']} rollouts, final images of {options['side']} px, one core", columns, rows)
    return 0


def measured(name: str, reward: Reward, candidates: list[Candidate], rounds: int) -> list[str]:
    """One row."""
    ways = {
        "batched": lambda: reward.score(candidates),
        "alone": lambda: np.concatenate([reward.score([candidate]) for candidate in candidates]),
    }
    away = float(np.abs(ways["batched"]() - ways["alone"]()).max())
    timings = alternately(ways, rounds)
    batched, alone = (len(candidates) / timings[way].median_cpu_s for way in ways)
    return [name, f"{batched:.0f}", f"{alone:.0f}", f"{batched / alone:.2f}", f"{away:.1e}"]


def some_candidates(count: int, side: int) -> list[Candidate]:
    """Rollouts of the bundled photographs, each degraded a little otherwise, with true texts."""
    manifest = read_manifest(project_root() / "recipes/assets/photographs/manifest.parquet")
    grids = tuple(np.zeros((side // 8, side // 8), np.int64) for _ in range(3))
    candidates = []
    for number in range(count):
        entry = manifest.entries[number % len(manifest)]
        picture = torch.from_numpy(decode_image(manifest.path(entry)).copy()).permute(2, 0, 1)[None].float()
        small, lq = (torch.nn.functional.interpolate(picture, (size, size), mode="area") for size in (side, side // 4))
        truth, low = (x[0].permute(1, 2, 0).round().byte().numpy() for x in (small, lq))
        image = ladder(truth, ["blur", "noise"], [number / count], number)[0]
        scene = entry.scene
        assert scene is not None, "the bundled photographs are described"
        trace = ParsedTrace(LABEL.phrase, scene.captions, grids, ())  # type: ignore[arg-type]
        candidates.append(
            Candidate(key=entry.key, lq=low, gt=truth, label=LABEL, scene=scene, trace=trace, image=image)
        )
    return candidates
