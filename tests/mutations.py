"""Lines that a test must defend: each is changed in a copy of the tree, and its test has to fail there.

    python -m tests.mutations [workers=N] [WORD ...]     only mutations whose file, name or test holds one of the words

Tests run in forks of one process that has imported the vendors; each of the N workers (default 1) keeps one copy for
all its mutations. Exit code 1 when a changed line survives, a row no longer finds its line, or a test fails without a
change. Add a row to a table beside this file, or to `second_device/mutations.py`, for every rule whose loss nobody
would see in the metrics.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.mutation_rooms import ROOM_MUTATIONS
from tests.mutation_table import MUTATIONS, Mutation
from tests.second_device.mutations import DEVICE_MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
ALL = (*MUTATIONS, *ROOM_MUTATIONS, *DEVICE_MUTATIONS)
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"
"""The vendors are imported before pytest starts."""
KILLED, SURVIVES, STALE, BROKEN = "killed  ", "SURVIVES", "STALE   ", "BROKEN  "
"""The test fails; it passes; the line is not there, or not once; the test fails without a change, or does not run."""


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


def judged(copy: Path, test: str, mutations: Sequence[Mutation]) -> Iterator[tuple[str, Mutation]]:
    """The verdict on each mutation of one test, which runs first on the unchanged copy."""
    if code := _tested(copy, test, changed=False):
        print(f"{test} ends with {code} on the unchanged tree: it cannot judge a mutation", flush=True)
        yield from ((BROKEN, mutation) for mutation in mutations)
        return
    for mutation in mutations:
        path = copy / mutation.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(mutation.old) != 1:
            yield STALE, mutation
            continue
        written = path.stat()
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        code = _tested(copy, test, changed=True)
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))  # its compiled form is valid again
        yield {0: SURVIVES, 1: KILLED}.get(code, BROKEN), mutation


def _tested(copy: Path, test: str, *, changed: bool) -> int:
    """pytest's exit code on the copy, in a fork that has the vendors' modules and none of ours.

    What is compiled of the unchanged copy is kept; of a changed one nothing is.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        for name in [name for name in sys.modules if name.split(".")[0] in ("realsr_hpc", "tests")]:
            del sys.modules[name]
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        if changed:
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
        sys.path.insert(0, str(copy))
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", IMPORTED, test]))
    except BaseException:
        traceback.print_exc()
        code = 70
    os._exit(code)


def _share(number: int, workers: int, mutations: Sequence[Mutation]) -> list[str]:
    """Verdicts of one worker, which takes every `workers`-th test."""
    verdicts = []
    with copied() as copy:
        for test in sorted({mutation.test for mutation in mutations})[number::workers]:
            for verdict, mutation in judged(copy, test, [each for each in mutations if each.test == test]):
                print(f"{verdict}  {mutation.name}  ({mutation.file})", flush=True)
                verdicts.append(verdict)
    return verdicts


def main(arguments: list[str]) -> int:
    """Judge the chosen mutations."""
    words = [word for word in arguments if not word.startswith("workers=")]
    workers = int(next((word.removeprefix("workers=") for word in arguments if word not in words), "1"))
    chosen = [m for m in ALL if not words or any(w in f"{m.name} {m.file} {m.test}" for w in words)]
    sys.path.insert(0, str(ROOT))
    for module in ("realsr_hpc.train.grpo", "tests.steps"):
        importlib.import_module(module)  # for the vendors they import
    began = time.monotonic()
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        shares = [pool.submit(_share, number, workers, chosen) for number in range(workers)]
    verdicts = [verdict for share in shares for verdict in share.result()]
    counts = ", ".join(f"{verdicts.count(kind)} {kind.strip().lower()}" for kind in (KILLED, SURVIVES, STALE, BROKEN))
    print(f"{len(verdicts)} mutations: {counts}; {(time.monotonic() - began) / 60:.0f} minutes")
    return 0 if verdicts and set(verdicts) == {KILLED} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
