"""Plans as tables: changes that would make a recipe fit, and several recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.advice import knobs, way_to_fit
from realsr_hpc.plan.estimate import plan

MOST_KNOBS = 8


def knob_table(config: RunConfig) -> Table:
    """Single changes that save memory, with peak and GPU time of each; the caption names changes that make it fit."""
    now = plan(config)
    table = Table("change", "peak, GiB", "fits", "time per step", title="Which knob to turn", title_justify="left")
    for knob in knobs(config)[:MOST_KNOBS]:
        per_gpu = knob.plan.step_s * knob.plan.world_size / (now.step_s * now.world_size) - 1.0
        fits = {True: "yes", False: "no", None: "?"}[knob.plan.fits]
        table.add_row(" ".join(knob.overrides), f"{knob.plan.total_gib:.1f}", fits, f"{per_gpu:+.0%} GPU-time")
    way = [override for knob in way_to_fit(config) for override in knob.overrides]
    table.caption = f"To fit: {' '.join(way)}" if way else "No combination of these fits: use larger or more GPUs"
    table.caption_justify = "left"
    return table


def side_by_side(configs: Sequence[RunConfig]) -> list[list[str]]:
    """One row per recipe with the columns `HEADINGS`; efficiency is relative to the first recipe."""
    rows: list[list[str]] = []
    first = plan(configs[0]).tokens_per_gpu_s
    for config in configs:
        estimate, parallel = plan(config), config.parallel
        sent = estimate.traffic
        rows.append(
            [
                f"{config.cluster.nodes} x {config.cluster.tasks_per_node}",
                f"{parallel.tp} x {parallel.pp} x {estimate.dp}",
                f"{estimate.sequences:,}",
                f"{estimate.total_gib:.1f}",
                f"{estimate.bubble:.1%}",
                f"{estimate.rollout_s:.1f}",
                f"{estimate.rewards_s:.1f}",
                f"{estimate.training_s:.1f}",
                f"{estimate.communication_s:.1f}",
                f"{sent.tp:.0f} + {sent.pp:.1f} + {sent.dp:.1f}",
                f"{estimate.tokens_per_gpu_s:,.0f}",
                f"{estimate.tokens_per_gpu_s / first:.0%}" if first else "",
            ]
        )
    return rows


HEADINGS = (
    "nodes x GPUs",
    "TP x PP x DP",
    "sequences",
    "GiB",
    "bubble",
    "rollout, s",
    "rewards, s",
    "training, s",
    "communication, s",
    "GB sent by a GPU: tp + pp + dp",
    "tokens/s/GPU",
    "efficiency",
)


def comparison(configs: Sequence[RunConfig], title: str) -> Table:
    """`side_by_side` as a table for the terminal."""
    table = Table(*HEADINGS, title=title)
    for row in side_by_side(configs):
        table.add_row(*row)
    return table


def markdown(configs: Sequence[RunConfig]) -> str:
    """`side_by_side` as a Markdown table."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *side_by_side(configs)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
