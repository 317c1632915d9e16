"""Peak memory of export and import: tools/export_hf.py and tools/import_weights.py on a model of random weights.

    python tools/bench.py conversion [hidden=1024] [layers=16] [shard_mb=100]

Each command is a process of its own; its peak of resident memory is the kernel's (files that are mapped while they are
read included), less that of the same command on a model of next to no size. In bf16, by one process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.benchmarks._measure import show
from tools.benchmarks._options import split_options

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments."""
    options, unknown = split_options(arguments, {"hidden": 1024, "layers": 16, "shard_mb": 100})
    if unknown:
        print(f"unknown argument {unknown[0]}; there are hidden, layers, shard_mb", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        base = peaks(Path(folder) / "base", 64, 1, options["shard_mb"])
        large = peaks(Path(folder) / "large", options["hidden"], options["layers"], options["shard_mb"])
        size = sum(path.stat().st_size for path in (Path(folder) / "large" / "export").glob("model*.safetensors"))
    rows = [
        [
            name,
            f"{large[name] / MIB:.0f}",
            f"{(large[name] - base[name]) / MIB:.0f}",
            f"{(large[name] - base[name]) / size:.2f}",
        ]
        for name in large
    ]
    title = f"a model of {size / MIB:.0f} MiB, shards of {options['shard_mb']} MB"
    show(title, ["", "peak, MiB", "above an empty model's", "copies of the model"], rows)
    return 0


def peaks(folder: Path, hidden: int, layers: int, shard_mb: int) -> dict[str, int]:
    """Bytes that each command held at its peak."""
    folder.mkdir()
    run, export, imported = folder / "run", folder / "export", folder / "imported"
    in_own_process(make_run, run, hidden, layers)
    return {
        "export_hf": peak_of("export_hf", f"run={run}", f"output={export}", f"shard_mb={shard_mb}"),
        "import_weights": peak_of("import_weights", f"source={export}", f"output={imported}"),
    }


def in_own_process(function: Callable[..., None], *arguments: object) -> None:
    """Run it where its memory dies with it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"


def peak_of(tool: str, *arguments: str) -> int:
    """Bytes of resident memory that a tool reached."""
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{tool} ended with {process.returncode}"
    return usage.ru_maxrss * 1024


def make_run(run: Path, hidden: int, layers: int) -> None:
    """A run folder with a checkpoint of random weights."""
    from realsr_hpc import checkpoint
    from realsr_hpc.config.load import compose_one, to_yaml
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.groups import initialise
    from realsr_hpc.tokenizer.trace import TraceTokenizer

    sizes = [f"model.hidden_size={hidden}", f"model.ffn_hidden_size={hidden * 11 // 4}", f"model.num_layers={layers}"]
    fixed = ["recipe=grpo_tiny", "cluster.tasks_per_node=1", "model.weights=null", "precision.params=bf16"]
    config = compose_one([*fixed, *sizes])
    groups = initialise(config.parallel, config.seed)
    size = TraceTokenizer.load(config, groups.device).codec.vocabulary.size
    run.mkdir()
    (run / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")
    state = {"step": 0, "data": {}, "counters": {}, "run_id": ""}
    policy = build_policy(config, groups, size, trainable=False)
    checkpoint.save(run / "checkpoints", 0, policy, None, state, checkpoint.Keep(last=1))
