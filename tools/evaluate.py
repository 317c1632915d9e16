"""Score a run on held-out images: python tools/evaluate.py run=RUN_DIR [against=RUN_DIR|start] [num_images=16].

The report goes to output=DIR, by default RUN_DIR/evaluation/STEP.
Also checkpoint=RUN_DIR/checkpoints/step-N instead of run=. `against` adds a second model to the table: another run's
newest checkpoint, or `start`, the weights the run began with. Other keys: split (heldout), crop_px (0).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from realsr_hpc.config.arguments import read_arguments, read_count  # noqa: E402

DEFAULTS = {
    "run": None,
    "checkpoint": None,
    "against": None,
    "output": None,
    "num_images": "16",
    "split": None,
    "crop_px": "0",
}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or a run that cannot be evaluated."""
    try:
        given = read_arguments(arguments, DEFAULTS)
        count, crop_px = read_count(given, "num_images", 1), read_count(given, "crop_px")
        report, folder = _evaluate(given, count, crop_px)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report.write(folder)
    print(report.markdown())
    print(f"{folder}: metrics.md, metrics.csv, grid.png")
    return 0


def _evaluate(given: dict[str, str | None], count: int, crop_px: int):
    from realsr_hpc.data.loader import LQLoader
    from realsr_hpc.evaluate import evaluate
    from realsr_hpc.restore import find_run, open_restorer
    from realsr_hpc.rewards.mixture import RewardMixture

    config, checkpoint = find_run(given["run"], given["checkpoint"])
    restorers = {}
    if given["against"] == "start":
        restorers["start"] = open_restorer(config, None)
    elif given["against"]:
        other, other_checkpoint = find_run(given["against"], None)
        restorers["against"] = open_restorer(other, other_checkpoint)
    restorers["ours"] = open_restorer(config, checkpoint)
    loader = LQLoader(config, given["split"] or config.data.heldout_split, count, shuffle=False)
    try:
        report = evaluate(restorers, loader.next(), rewards=RewardMixture(config.rewards), crop_px=crop_px)
    finally:
        loader.close()
    default = checkpoint.parent.parent / "evaluation" / checkpoint.name
    return report, Path(given["output"] or default)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
