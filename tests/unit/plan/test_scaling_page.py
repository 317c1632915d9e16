"""docs/scaling.md shows what the planner says."""

from __future__ import annotations

import pytest

from realsr_hpc.paths import project_root
from realsr_hpc.plan.tables import markdown
from tools.benchmarks.planned import TITLES, recipes


@pytest.mark.parametrize("table", TITLES)
def test_the_page_has_the_planners_table(table):
    page = (project_root() / "docs" / "scaling.md").read_text()
    assert f"{TITLES[table]}:\n\n{markdown(recipes(table))}\n" in page, "python tools/bench.py planned markdown=true"
