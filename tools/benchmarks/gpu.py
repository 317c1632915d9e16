"""One GPU, ten minutes, one report: parity with the CPU, training, FP8, decoding, degradation, rewards.

    python tools/bench.py gpu [parts=parity,train,fp8,decode,degradation,rewards] [output=runs/gpu-report]
    python tools/bench.py gpu device=cpu            # rehearsal on narrow shapes; its figures say nothing

Writes report.json and report.md. Each part runs in a process of its own for at most 90 s: one that fails or hangs is
reported, and the others run. Exit code 0: all parts ran and are as expected; 1: not so; 2: it did not start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from realsr_hpc.config.arguments import read_arguments
from realsr_hpc.files import writable_folder, write_atomically
from realsr_hpc.paths import project_root

DEFAULTS: dict[str, str | None] = {
    "device": "cuda",
    "parts": "parity,train,fp8,decode,degradation,rewards",
    "output": "runs/gpu-report",
    "only": None,
}
"""only: this part alone, here, its figures into output/PART.json; what the command calls itself with."""
PART_S = 90
CPU_NUMBERS = "cpu_numbers"
"""The CPU's half of parity."""


def main(arguments: list[str]) -> int:
    """See the module."""
    try:
        given = {name: value or "" for name, value in read_arguments(arguments, DEFAULTS, __doc__).items()}
        parts = given["parts"].split(",")
        unknown = [part for part in parts if part not in (DEFAULTS["parts"] or "").split(",")]
        if unknown:
            raise ValueError(f"parts={given['parts']}: no part {unknown[0]!r}; there are {DEFAULTS['parts']}")
        if given["device"] not in ("cuda", "cpu"):
            raise ValueError(f"device={given['device']}: it is cuda, or cpu for a rehearsal")
        _choose_device(given["device"])
        folder = Path(given["output"]).resolve()
        writable_folder(folder, "output")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given["only"]:
        write_atomically(folder / f"{given['only']}.json", json.dumps(measure(given["only"], given["device"], folder)))
        return 0
    results = {part: in_own_process(part, given["device"], folder) for part in parts}
    report = {"machine": machine(given["device"]), "parts": compared(results)}
    write_atomically(folder / "report.json", json.dumps(report, indent=1))
    write_atomically(folder / "report.md", markdown(report))
    print(markdown(report))
    print(f"{folder}: report.json, report.md")
    return 0 if all(part["status"] == "as expected" for part in results.values()) else 1


def _choose_device(name: str) -> None:
    import torch

    from realsr_hpc.parallel import backend

    if name == "cpu":
        backend.compute_on(torch.device("cpu"))
    elif not backend.on_cuda():
        raise ValueError("bench.py gpu measures a GPU, and torch sees none here: device=cpu rehearses it on the CPU")


def measure(part: str, device: str, folder: Path) -> list[dict[str, Any]]:
    """A part's figures, computed in this process; device: `cpu` for narrow shapes."""
    from tools.benchmarks import _gpu_models as models
    from tools.benchmarks import _gpu_pixels as pixels

    narrow = device != "cuda"
    size = models.SIZES["narrow" if narrow else "full"]
    if part == CPU_NUMBERS:
        models.numbers(models.SIZES["parity"], folder / "cpu.npz")
        return []
    parts: dict[str, Callable[[], list[models.Figure]]] = {
        "parity": lambda: models.parity(models.SIZES["parity"], folder, lambda: numbers_of_cpu(folder)),
        "train": lambda: models.training(size, fp8=False),
        "fp8": lambda: models.training(size, fp8=True),
        "decode": lambda: models.decoding(size),
        "degradation": lambda: pixels.degradation(size, 64 if narrow else 512, 2 if narrow else 16),
        "rewards": lambda: pixels.rewards(size, [], 2 if narrow else 64),
    }
    return [asdict(figure) | {"as_expected": figure.as_expected} for figure in parts[part]()]


def in_own_process(part: str, device: str, folder: Path) -> dict[str, Any]:
    """Status, seconds and figures of a part, or what went wrong in it."""
    started = time.perf_counter()
    error, figures = _started(part, device, folder), []
    if not error:
        written = folder / f"{part}.json"
        figures = json.loads(written.read_text(encoding="utf-8"))
        written.unlink()
    expected = all(figure["as_expected"] for figure in figures)
    status = "failed" if error else "as expected" if expected else "not as expected"
    return {"status": status, "seconds": time.perf_counter() - started, "error": error, "figures": figures}


def _started(part: str, device: str, folder: Path) -> str:
    """Run a part as a program; its last line of error, "" when it succeeded."""
    tool = Path(__file__).resolve().parents[1] / "bench.py"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, str(tool), "gpu", f"device={device}", f"only={part}", f"output={folder}"]
    (folder / f"{part}.json").unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PART_S,
            env=environment,
            cwd=project_root(),
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {PART_S} s and was stopped"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def numbers_of_cpu(folder: Path) -> None:
    """The CPU's half of parity, into `folder`/cpu.npz. RuntimeError saying why there is none."""
    if error := _started(CPU_NUMBERS, "cpu", folder):
        raise RuntimeError(f"the CPU's half failed: {error}")
    (folder / f"{CPU_NUMBERS}.json").unlink()


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    import torch

    from realsr_hpc.parallel import backend

    found = {
        "device": backend.name_of(backend.device()),
        "torch": str(torch.__version__),
        "CUDA": str(torch.version.cuda or "none"),
        "Transformer Engine": "yes" if backend.has_transformer_engine() else "no",
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }
    return found if device == "cuda" else found | {"note": "rehearsal on narrow shapes: the figures say nothing"}


def compared(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With what two parts say together: how much faster FP8 makes a step."""
    steps = {
        part: figure["value"] for part in ("train", "fp8") if part in results
        for figure in results[part]["figures"] if figure["name"] == "step"
    }  # fmt: skip
    if len(steps) == 2:
        gain = steps["train"] / steps["fp8"]
        figure = {"name": "faster than bf16 by", "value": gain, "unit": "x", "least": 1.25, "most": None}
        results["fp8"]["figures"].append(figure | {"as_expected": gain >= 1.25})
    return results


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = ["# One GPU, measured", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}: {part['status']} ({part['seconds']:.0f} s)", ""]
        if part["error"]:
            lines += [part["error"]]
            continue
        lines += ["| figure | value | expected |", "|---|---:|---|"]
        for figure in part["figures"]:
            bounds = [(">=", figure["least"]), ("<=", figure["most"])]
            expected = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
            mark = "" if figure["as_expected"] else " (no)"
            lines.append(f"| {figure['name']} | {figure['value']:.4g} {figure['unit']} | {expected}{mark} |")
    return "\n".join(lines) + "\n"
