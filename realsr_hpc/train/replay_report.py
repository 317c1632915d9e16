"""Reports a replayed step: a table, a picture, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from realsr_hpc.files import write_atomically
from realsr_hpc.locks import sole_writer
from realsr_hpc.train.replay import Outcome, Replay, is_equal


def table(replay: Replay, overrides: Sequence[str]) -> str:
    """Every number of the step's updates as reported, again, and with the overrides; then the rewards' shares."""
    other, rows = replay.other, []
    for name, value in sorted(replay.again.metrics.items()):
        reported = replay.step.metrics.get(name)
        cells = ["-" if reported is None else f"{reported:.9g}", f"{value:.9g}"]
        cells.append("equal" if is_equal(reported, value) else "near" if replay.agrees(name, value) else "DIFFERS")
        rows.append([name, *cells, *([f"{other.metrics.get(name, float('nan')):.9g}"] if other else [])])
    for name, share in replay.again.shares.items():
        cells = [f"share of {name} in the advantages", "-", f"{share:.1%}", "-"]
        rows.append([*cells, *([f"{other.shares[name]:.1%}"] if other else [])])
    header = ["", "reported", "again", "", *(["with " + " ".join(overrides)] if other else [])]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{verdict(replay)}\n"


def verdict(replay: Replay) -> str:
    """One sentence: whether the replay reproduced the step's reported metrics."""
    where = "on the run's layout" if replay.same_layout else f"on another layout, tolerance {replay.tolerance:g}"
    faults = replay.faults()
    if faults:
        return f"Step {replay.step.number} is NOT reproduced ({where}): {', '.join(faults)} differ"
    return f"Step {replay.step.number} is reproduced ({where})."


def write(replay: Replay, overrides: Sequence[str], folder: Path) -> None:
    """replay.md, replay.json and replay.png into `folder`. ValueError: not writable, or another process writes."""
    with sole_writer(folder):
        _write(replay, overrides, folder)


def _write(replay: Replay, overrides: Sequence[str], folder: Path) -> None:
    write_atomically(folder / "replay.md", table(replay, overrides))
    content = {
        "step": replay.step.number,
        "overrides": list(overrides),
        "same_layout": replay.same_layout,
        "tolerance": replay.tolerance,
        "faults": replay.faults(),
        "reported": {name: replay.step.metrics.get(name) for name in replay.again.metrics},
        "again": _plain(replay.again),
        "other": None if replay.other is None else _plain(replay.other),
    }
    write_atomically(folder / "replay.json", json.dumps(content, indent=1))
    draw(replay, overrides, folder / "replay.png")


def _plain(outcome: Outcome) -> dict[str, object]:
    return {"metrics": outcome.metrics, "shares": outcome.shares, "advantages": outcome.advantages.tolist()}


def draw(replay: Replay, overrides: Sequence[str], path: Path) -> None:
    """Shares of the rewards, and every rollout's advantage, as it was and with the overrides."""
    from matplotlib.figure import Figure

    outcomes = {"as it was": replay.again}
    if replay.other is not None:
        outcomes[" ".join(overrides)] = replay.other
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names, width = list(replay.again.shares), 0.8 / len(outcomes)
    for number, (label, outcome) in enumerate(outcomes.items()):
        places = [place + (number - (len(outcomes) - 1) / 2) * width for place in range(len(names))]
        left.barh(places, [outcome.shares[name] for name in names], width, label=label)
    left.set(title="share in the advantages", yticks=range(len(names)), yticklabels=names, xlim=(0, 1))
    left.legend(fontsize="small")
    for label, outcome in outcomes.items():
        right.plot(outcome.advantages, ".", label=label)
    right.set(title=f"advantages of step {replay.step.number}", xlabel="rollout", ylabel="advantage")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
