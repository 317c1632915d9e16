"""Writes a comparison: comparison.md, comparison.html (one file with images embedded), comparison.csv and PNGs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from realsr_hpc.compare.axes import plot_axes
from realsr_hpc.compare.figures import image_rows, plot_curves
from realsr_hpc.compare.repetitions import Estimate, Group, group_runs
from realsr_hpc.compare.runs import Comparison
from realsr_hpc.config.metrics import lower_is_better
from realsr_hpc.locks import sole_writer
from realsr_hpc.tracking.drawing import image_grid

TEMPLATE = "report.html.j2"
MAX_PANELS = 9


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column has the row names."""

    title: str
    remark: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, under a heading."""
        lines = ["| " + " | ".join(self.head) + " |", "|---" * len(self.head) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([f"## {self.title}", "", *([self.remark, ""] if self.remark else []), *lines, ""])


def write_report(comparison: Comparison, folder: Path, title: str) -> list[Path]:
    """Write the report into `folder`; returns its files. ValueError if another process writes there, or it cannot."""
    with sole_writer(folder):
        return _write(comparison, folder, title)


def _write(comparison: Comparison, folder: Path, title: str) -> list[Path]:
    groups = group_runs(comparison)
    comparison.write_csv(folder / "comparison.csv")
    plot_curves(groups, panels(comparison), folder / "curves.png")
    files = [folder / "comparison.csv", folder / "curves.png"]
    if plot_axes(groups, comparison.deciding, comparison.metric, folder / "axes.png"):
        files.append(folder / "axes.png")
    headers, rows = image_rows(groups)
    if rows:
        image_grid(rows, headers).save(folder / "grid.png")
        files.append(folder / "grid.png")
    tables = [final_table(comparison, groups), change_table(comparison, groups), evaluation_table(comparison, groups)]
    tables += [cost_table(groups), config_table(comparison, groups)]
    tables = [table for table in tables if table.rows]
    pictures = [path.name for path in files if path.suffix == ".png"]
    text = [f"# {title}", "", verdict(comparison, groups), "", *(table.markdown() for table in tables)]
    text += [f"![{name}]({name})\n" for name in pictures]
    (folder / "comparison.md").write_text("\n".join(text), encoding="utf-8")
    page = _html(title, verdict(comparison, groups), tables, folder, pictures)
    (folder / "comparison.html").write_text(page, encoding="utf-8")
    return [folder / "comparison.md", folder / "comparison.html", *files]


def panels(comparison: Comparison) -> list[str]:
    """Metrics whose curves are drawn: the compared one first, then held-out and reward metrics."""
    known = {key for run in comparison.runs for key in run.histories if key.startswith(("heldout/", "rewards/"))}
    ordered = [key for key in comparison.columns() if key in known]
    return ordered[:MAX_PANELS] or [comparison.metric]


def verdict(comparison: Comparison, groups: Sequence[Group]) -> str:
    """The result in one or two sentences: the best group, and its paired difference from the first group."""
    metric = comparison.metric
    sound = [group for group in groups if not group.diverged(metric)]
    rated = [group for group in sound if group.final(metric).num_runs]
    diverged = sum(group.diverged(metric) for group in groups)
    remark = f" {diverged} run(s) diverged: {metric} is not finite." if diverged else ""
    if not rated:
        return f"No run has {metric} yet.{remark}"
    lower = lower_is_better(metric)
    best = (min if lower else max)(rated, key=lambda group: group.final(metric).mean)
    direction = "lower is better" if lower else "higher is better"
    text = f"Best by {metric} ({direction}): {best.label}, {best.final(metric)} over {len(best.runs)} run(s).{remark}"
    if len(rated) > 1 and best is not rated[0]:
        gain = best.less(rated[0], metric)
        sure = "more than chance at 95 %" if gain.excludes_zero else "not more than chance at 95 %"
        text += f" Difference from {rated[0].label}, paired by seed: {gain}: {sure}."
    return text


def final_table(comparison: Comparison, groups: Sequence[Group]) -> Table:
    """Last values of all metrics."""
    columns = comparison.columns()
    rows = [[column, *(str(group.final(column)) for group in groups)] for column in columns]
    remark = "Last values: mean [95 % Student interval] over runs that differ in their seed alone."
    return Table("Results", remark, ["metric", *_names(groups)], rows)


def change_table(comparison: Comparison, groups: Sequence[Group]) -> Table:
    """What training changed on held-out images, and the difference to the first group."""
    columns = [column for column in comparison.columns() if column.startswith("heldout/")]
    rows = [[column, *(str(group.change(column)) for group in groups)] for column in columns]
    base = groups[0] if groups else None
    for group in groups[1:]:
        for column in columns[:1]:
            cells = [str(item.less(base, column)) if item is group and base else "" for item in groups]
            rows.append([f"{column}, less {base.label if base else ''}, paired by seed", *cells])
    return Table("Change from the first held-out measurement to the last", "", ["metric", *_names(groups)], rows)


def evaluation_table(comparison: Comparison, groups: Sequence[Group]) -> Table:
    """Differences from the start weights on evaluated sets, for runs that were evaluated with them."""
    starts = {key: key.replace("/ours/", "/start/") for key in comparison.columns() if "/ours/" in key}
    gains = {key: [group.gain(key, start) for group in groups] for key, start in starts.items()}
    rows = [
        [key.removeprefix("evaluate/").replace("/ours/", ": "), *(_marked(gain) for gain in row)]
        for key, row in gains.items()
        if any(gain.num_runs for gain in row)
    ]
    remark = "Mean [95 % Student interval] over runs that differ in their seed alone; * marks intervals without 0."
    return Table("Evaluated sets: difference from the start weights", remark, ["set: metric", *_names(groups)], rows)


def _marked(gain: Estimate) -> str:
    return f"{gain} *" if gain.excludes_zero else str(gain)


def cost_table(groups: Sequence[Group]) -> Table:
    """Process-hours and sampled tokens, if the runs measured them."""
    rows = [
        ["process-hours per run", *(str(group.process_hours()) for group in groups)],
        ["tokens sampled a run", *(str(group.rollout_tokens()) for group in groups)],
        ["runs", *(str(len(group.runs)) for group in groups)],
        ["finished", *(str(sum(run.status == "FINISHED" for run in group.runs)) for group in groups)],
    ]
    remark = "Process-hours are GPU-hours where each process has a GPU: the measured parts of all steps."
    return Table("Cost", remark, ["", *_names(groups)], rows)


def config_table(comparison: Comparison, groups: Sequence[Group]) -> Table:
    """Recipe keys that differ between the groups."""
    rows = [[key, *(group.runs[0].params.get(key, "–") for group in groups)] for key in comparison.deciding]
    return Table("What differs in the recipes", "", ["key", *_names(groups)], rows)


def _names(groups: Sequence[Group]) -> list[str]:
    return [group.label for group in groups]


def _html(title: str, verdict: str, tables: Sequence[Table], folder: Path, pictures: Sequence[str]) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    encoded = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in pictures}
    return environment.get_template(TEMPLATE).render(title=title, verdict=verdict, tables=tables, pictures=encoded)
