"""The table of mutations follows the code: a line that moved would no longer be defended."""

from __future__ import annotations

import re

import pytest

from tests.mutation_table import Mutation
from tests.mutations import ALL, ROOT


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_every_mutation_finds_its_line_and_its_test(mutation: Mutation):
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    path, _, test = mutation.test.partition("::")
    assert (
        re.search(rf"^def {test}\b", (ROOT / path).read_text(encoding="utf-8"), re.M)
        if test
        else (ROOT / path).exists()
    )
