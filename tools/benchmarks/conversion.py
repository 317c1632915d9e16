"""A 7B folder made, imported, checkpointed, exported, opened and sampled: memory of each command, and equality.

    python tools/bench.py conversion [layers=2] [hidden=4096] [shard_mb=1000] [tokens=48] [folder=DIR]

layers=32 is the whole 7B: 7,013,158,912 parameters, 14 GB in bf16, of which up to four copies lie in `folder` (default:
a temporary one) until the end. Each command is a process of its own; counted is what it allocates (`RssAnon` of it and
its children, read every 10 ms), beside which the mapped files need no memory that the system could not take back. One
import is killed half-way first. Then `tokens` tokens are drawn from the imported policy, and their log-probabilities
compared with those of transformers' classes on the folder that was imported, in bf16 and in float32.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.config.arguments import read_arguments, read_counts
from tools.benchmarks import _conversion_steps as steps
from tools.benchmarks._measure import show

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
POLL_S = 0.01


@dataclass(frozen=True)
class Peak:
    """What one process took."""

    wall_s: float
    anonymous: int
    """Bytes at the peak, mapped files left out."""


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments, 1 when a killed import left something whole or the two models disagree."""
    counts = {"layers": "2", "hidden": "4096", "shard_mb": "1000", "tokens": "48"}
    given = read_arguments(arguments, {**counts, "folder": ""}, __doc__)
    with tempfile.TemporaryDirectory(dir=given["folder"] or None) as folder:
        return measure(Path(folder), read_counts(given, counts))


def measure(folder: Path, options: dict[str, int]) -> int:
    """Every command in turn, each on what the one before left."""
    shape = steps.overrides(options["layers"], options["hidden"])
    source, imported, run, export = (folder / name for name in ("source", "imported", "run", "export"))
    words = [f"source={source}", f"output={imported}", f"image_tokenizer={folder / 'image.safetensors'}", *shape]
    peaks = {"made": of_function(steps.make_source, source, shape, options["shard_mb"] * 10**6)}
    size = weight_bytes(source)
    killed = kill_half_way(words, folder, size)
    peaks["import_weights"] = of_tool("import_weights", *words)
    started = [*shape, *steps.starting_from(imported)]
    peaks["opened, sampled"] = of_function(steps.sample, started, options["tokens"], folder / "drawn.pt")
    peaks["transformers on the source"] = of_function(steps.compare, source, folder / "drawn.pt", folder / "said.pt")
    peaks["opened, checkpointed"] = of_function(steps.make_run, run, started)
    shutil.rmtree(source)
    peaks["export_hf"] = of_tool("export_hf", f"run={run}", f"output={export}", f"shard_mb={options['shard_mb']}")
    rows = [
        [name, f"{p.wall_s:.0f}", f"{p.anonymous / GB:.2f}", f"{p.anonymous / size:.2f}"] for name, p in peaks.items()
    ]
    title = (
        f"{steps.parameters(shape):,} parameters, {size / GB:.2f} GB; a killed import: {killed or 'left nothing whole'}"
    )
    show(title, ["", "wall, s", "allocated at the peak, GB", "copies of the weights"], rows)
    same = steps.same_weights(imported, export)
    print(f"export of what was opened: {'every tensor' if same else 'NOT every tensor'} as imported, bit for bit")
    return 0 if steps.report(folder / "said.pt") and same and not killed else 1


def weight_bytes(folder: Path) -> int:
    """Of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def kill_half_way(words: list[str], folder: Path, size: int) -> str:
    """What an import, killed when half is written, left that looks whole; empty: nothing."""
    process = _started("import_weights", *words)
    while process.poll() is None and _written(folder) < size / 2:
        time.sleep(POLL_S)
    process.kill()
    process.wait()
    hidden = [path for path in folder.glob(".imported.*") if path.is_dir()]  # the lock beside it stays
    whole = "it ended before half was written" if not hidden else ""
    whole = "output is there" if (folder / "imported").exists() else whole
    for path in hidden:
        whole = whole or ("SHA256SUMS are there" if (path / "SHA256SUMS").exists() else "")
        shutil.rmtree(path)
    return whole


def _written(folder: Path) -> int:
    return sum(weight_bytes(path) for path in folder.glob(".imported.*"))


def _started(tool: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(ROOT / "tools" / f"{tool}.py"), *words], cwd=ROOT)


def of_tool(tool: str, *words: str) -> Peak:
    """Run one of the project's commands, its progress bar shown."""
    started = time.perf_counter()
    process = _started(tool, *words)
    peak = watched(process.pid, process.poll)
    assert process.returncode == 0, f"{tool} ended with {process.returncode}"
    return Peak(time.perf_counter() - started, peak)


def of_function(function: Callable[..., None], *arguments: object) -> Peak:
    """Run it where its memory dies with it."""
    started = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    assert process.pid is not None, "a started process has a number"
    peak = watched(process.pid, lambda: process.exitcode)
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"
    return Peak(time.perf_counter() - started, peak)


def watched(pid: int, ended: Callable[[], int | None]) -> int:
    """Bytes of anonymous memory at the peak of a process and its children."""
    peak = 0
    while ended() is None:
        peak = max(peak, _anonymous(pid))
        time.sleep(POLL_S)
    return peak


def _anonymous(pid: int) -> int:
    """Shared memory counts: what a process hands to its children lies there. 0 for one that ended meanwhile."""
    folder = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines())
        listed = [path.read_text(encoding="utf-8") for path in folder.glob("task/*/children")]
        children = [int(child) for line in listed for child in line.split()]
    except (OSError, ValueError):
        return 0
    own = sum(int(status.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem"))
    return own * 1024 + sum(_anonymous(child) for child in children)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
