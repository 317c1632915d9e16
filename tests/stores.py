"""MLflow's database is made once a session and copied: its tables take many seconds, and every output root has its own.

Importing this does it, in the test session and in the server that ranks are forked from (tests/distributed). A command
that a test starts makes its own, unless the test has laid a copy there (the fixture `store`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from realsr_hpc.locks import hold
from realsr_hpc.tracking import database

VARIABLE = "REALSR_HPC_TEST_STORE"
"""Path of the database that is copied; the first who needs it makes it."""
_make = database._make


def first_made() -> Path:
    """The database that is copied, made when nobody has."""
    path = Path(os.environ[VARIABLE])
    with hold(path.with_name("making.lock"), "", 300.0):
        if not path.exists():
            _make(path)
    return path


def copied(path: Path) -> None:
    """In place of `database._make`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.copy(first_made(), aside)
    os.replace(aside, path)


if VARIABLE in os.environ:
    database._make = copied
