"""Published results for comparison: the paper's table, from a data file."""

from __future__ import annotations

from pathlib import Path

import yaml

from realsr_hpc.evaluate.sets import NAMED_SETS

DATA_FILE = Path(__file__).with_name("published.yaml")


def published_table(set_name: str) -> list[str]:
    """Markdown lines with the paper's results on a set; empty if the paper does not report it."""
    known = NAMED_SETS.get(set_name)
    data = yaml.safe_load(DATA_FILE.read_text(encoding="utf-8"))
    if known is None or known.title not in data["sets"]:
        return []
    rows = data["sets"][known.title]
    lines = [f"Published on {known.title} ({data['source']}):", ""]
    lines += ["| method | " + " | ".join(data["columns"]) + " |", "|---" * (len(data["columns"]) + 1) + "|"]
    for method, values in rows.items():
        lines.append(f"| {method} | " + " | ".join("–" if value is None else f"{value:g}" for value in values) + " |")
    return [*lines, "", f"- {data['remark']}"]
