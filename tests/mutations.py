"""Lines that a test must defend: each is changed in a copy of the tree, and its test has to fail there.

    python -m tests.mutations [WORD ...]     only mutations whose file, name or test holds one of the words

Exit code 1 when a changed line survives. Add a row to `mutation_rooms.py`, `mutation_table.py` or
`second_device/mutations.py` for every rule whose loss nobody would see in the metrics.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

from tests.mutation_rooms import ROOM_MUTATIONS
from tests.mutation_table import MUTATIONS, Mutation
from tests.second_device.mutations import DEVICE_MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"
"""The vendors are imported before pytest starts."""


@contextmanager
def copied() -> Iterator[Path]:
    """What the tests need of the tree, in a folder that goes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("realsr_hpc", "tests", "recipes"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "photographs"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        photographs = Path("recipes/assets/photographs")  # large, and nothing of it is changed
        (copy / photographs).symlink_to(ROOT / photographs)
        yield copy


def survives(mutation: Mutation) -> bool:
    """Whether the test passes on the changed copy; ValueError when the line is not there, or not once."""
    with copied() as copy:
        text = (copy / mutation.file).read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.file}"
            )
        (copy / mutation.file).write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        code = _tested(copy, mutation.test)
        if code not in (0, 1):
            raise ValueError(f"{mutation.name}: pytest ended with {code} on {mutation.test}, see above")
        return code == 0


def _tested(copy: Path, test: str) -> int:
    """pytest's exit code on the copy, in a fork that has the vendors' modules and none of ours."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        for name in [name for name in sys.modules if name.split(".")[0] in ("realsr_hpc", "tests")]:
            del sys.modules[name]
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path.insert(0, str(copy))
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", IMPORTED, test]))
    except BaseException:
        traceback.print_exc()
        code = 70
    os._exit(code)


def main(words: list[str]) -> int:
    """Run the chosen mutations one after another, after their tests on the unchanged tree."""
    chosen = [
        m
        for m in (*MUTATIONS, *ROOM_MUTATIONS, *DEVICE_MUTATIONS)
        if not words or any(w in f"{m.name} {m.file} {m.test}" for w in words)
    ]
    sys.path.insert(0, str(ROOT))
    for module in ("realsr_hpc.train.grpo", "tests.steps"):
        importlib.import_module(module)  # for the vendors they import
    alive = []
    for test in sorted({mutation.test for mutation in chosen}):
        with copied() as copy:
            if _tested(copy, test):
                raise ValueError(f"{test} fails on the unchanged tree: it cannot judge a mutation")
    for mutation in chosen:
        lives = survives(mutation)
        alive += [mutation.name] if lives else []
        print(f"{'SURVIVES' if lives else 'killed  '}  {mutation.name}  ({mutation.file})", flush=True)
    return 1 if alive or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
