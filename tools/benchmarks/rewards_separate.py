"""Does each reward tell a good rollout from a bad one: share of pairs in the right order, 0.5 is chance.

    python tools/bench.py rewards_separate [images=64] [side=128] [rewards=NAME] [section.field=value ...]

Good is what a perfect policy would write of a held-out photograph: its true words, captions and truth. Each column
spoils one part of it: the degradation words, the texts or the image of another photograph; the truth blurred, noisy or
through JPEG at half of the ladder's severity; the LQ image enlarged (bicubic); the last text left out. A pair counts
one where the good rollout earns more, half where both earn the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.quality.ladder import ladder
from realsr_hpc.records import Candidate, LQBatch, ParsedTrace
from realsr_hpc.rewards.mixture import build_reward
from tools.benchmarks._measure import show

SEVERITY = 0.5
SPOILT = ("words", "texts", "image", "blur", "noise", "jpeg", "enlarged", "part")


def main(arguments: list[str]) -> int:
    """Exit code 2 for a wrong recipe."""
    given, overrides = read_with_overrides(arguments, {"images": "64", "side": "128"}, __doc__)
    options = read_counts(given, given)
    torch.set_num_threads(1)
    side = options["side"]
    sizes = [f"vlcot.image_sizes_px=[{side // 4},{side // 2},{side}]", "model.max_sequence_tokens=100000",
             "parallel.microbatch_tokens=100000", "rollout.max_new_tokens=50000"]  # fmt: skip
    try:
        config = compose_one(["recipe=grpo_tiny", *sizes, *overrides])
    except RecipeError as error:
        print(error)
        return 2
    loader = LQLoader(config, config.data.heldout_split, options["images"], shuffle=False)
    good = _true(loader.next())
    loader.close()
    bad = {kind: [_spoilt(kind, good, number) for number in range(len(good))] for kind in SPOILT}
    rows = []
    for name, term in config.rewards.terms.items():
        reward = build_reward(name, term)
        best = reward.score(good)
        orders = {kind: np.sign(best - reward.score(candidates)) for kind, candidates in bad.items()}
        rows.append([name, *(f"{(order.mean() + 1) / 2:.2f}" for order in orders.values())])
    show(f"{len(good)} held-out photographs, final images of {side} px", ("reward", *SPOILT), rows)
    return 0


def _true(batch: LQBatch) -> list[Candidate]:
    grid = np.zeros((4, 4), np.int64)
    found = []
    for case in batch.cases():
        assert case.label is not None and case.scene is not None, "the bundled photographs are described"
        trace = ParsedTrace(case.label.phrase, case.scene.captions, (grid, grid, grid), ())
        found.append(case.candidate(trace, case.gt))
    return found


def _spoilt(kind: str, good: list[Candidate], number: int) -> Candidate:
    """The same rollout with one part of it worse."""
    item, other = good[number], good[(number + 1) % len(good)]
    assert item.image is not None, "the truth is its image"
    match kind:
        case "words":
            return replace(item, trace=replace(item.trace, degradation=other.trace.degradation))
        case "texts":
            return replace(item, trace=replace(item.trace, texts=other.trace.texts))
        case "part":
            return replace(item, trace=replace(item.trace, texts=(*item.trace.texts[:2], None), faults=("texts",)))
        case "image":
            return replace(item, image=other.image)
        case "enlarged":
            side = len(item.image)
            enlarged = Image.fromarray(item.lq).resize((side, side), Image.Resampling.BICUBIC)
            return replace(item, image=np.asarray(enlarged))
    return replace(item, image=ladder(item.image, [kind], [SEVERITY], number)[0])
