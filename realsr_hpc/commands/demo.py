"""The whole system in minutes on a CPU: GRPO on the bundled photographs, and its effect.

realsr-hpc demo [section.field=value ...] runs launch, evaluate, restore, export-hf and gallery one after another and
prints each command. Overrides change the recipe grpo_tiny. A finished run is not repeated.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from realsr_hpc import runfolder
from realsr_hpc.artifacts import evaluation
from realsr_hpc.config.arguments import read_with_overrides
from realsr_hpc.config.load import compose
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.launch.rundir import run_folder
from realsr_hpc.paths import module_command, project_root, python_path, resolve
from realsr_hpc.tracking.drawing import curves, image_grid
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.tracking.store import tracking_uri

LOAD_EXPORT = (
    "import sys; from transformers import AutoModelForCausalLM as Model; "
    "m, report = Model.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True); "
    "assert not report['missing_keys'], report; "
    "print(type(m).__name__, f'{m.num_parameters():,} parameters, loaded by transformers')"
)


def main(arguments: list[str]) -> int:
    """Exit code of the first command that failed, else 0; 2 for wrong usage."""
    console = Console(markup=False, emoji=False)
    try:
        _, overrides = read_with_overrides(arguments, {}, __doc__)
        config = compose(["recipe=grpo_tiny", *overrides])
    except ValueError as error:
        console.print(str(error), style="red")
        return 2
    assert isinstance(config, RunConfig)
    run_dir = run_folder(config)
    report, export = runfolder.demo(run_dir), runfolder.demo_export(run_dir)
    commands = [
        ["launch", "recipe=grpo_tiny", *overrides],
        ["evaluate", f"run={run_dir}", "against=start", "num_images=12", f"output={report}"],
        ["restore", f"run={run_dir}", f"input={small_photograph(report)}", f"output={report / 'restored'}"],
    ]
    if not export.exists():
        commands.append(["export-hf", f"run={run_dir}", f"output={export}"])
    commands.append(["-c", LOAD_EXPORT, str(export)])
    commands.append(["gallery", f"run={run_dir}", f"evaluation={report}", f"output={report / 'gallery.html'}"])
    for command in commands:
        foreign = command[0] == "-c"
        shown = "python -c '(load it with transformers)'" if foreign else f"realsr-hpc {' '.join(command)}"
        console.rule(shown, align="left")
        program = [sys.executable, *command] if foreign else module_command("realsr_hpc.commands", *command)
        here = {**os.environ, "PYTHONPATH": python_path()}
        code = subprocess.run(program, cwd=project_root(), env=here).returncode
        if code:
            console.print(f"that failed with exit code {code}", style="red")
            return code
    show(console, config, run_dir, report, export)
    return 0


def small_photograph(folder: Path) -> Path:
    """Write a held-out photograph reduced to 64 px, as an input to restore."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "flower_64px.png"
    with Image.open(resolve("recipes/assets/photographs/flower.jpg")) as photograph:
        photograph.resize((64, 64), Image.Resampling.BOX).save(path)
    return path


def show(console: Console, config: RunConfig, run_dir: Path, report: Path, export: Path) -> None:
    """Print rewards before and after, the paths of all results, and the command that opens MLflow."""
    steps = metrics_by_step(run_dir)
    heldout = {step: metrics for step, metrics in steps.items() if "heldout/total/mean" in metrics}
    first, last = min(heldout), max(heldout)
    names = sorted(name for name in heldout[first] if name.startswith("heldout/"))
    table = Table("held-out reward", f"step {first}", f"step {last}", "change", title="What GRPO learned")
    for name in names:
        before, after = heldout[first][name], heldout[last][name]
        row = (name.split("/")[1], f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
        table.add_row(*row, style="bold" if name == "heldout/total/mean" else "")
    series = {
        "training rollouts": _series(steps, "rewards/total/mean"),
        "held-out images": _series(steps, "heldout/total/mean"),
    }
    curves(report / "reward.png", series, f"{config.name}: mean reward", "reward")
    draw_story(report)
    console.rule("outcome", align="left")
    console.print(Markdown((report / "metrics.md").read_text(encoding="utf-8")))
    console.print(table)
    for name, path in {
        "reward curve": report / "reward.png",
        "input | bicubic | before | after | truth, with the model's texts": report / "story.png",
        "a restored photograph": report / "restored",
        "page with all images, texts and rewards": report / "gallery.html",
        "Hugging Face export": export,
    }.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    program = str(Path(sys.executable).parent / "mlflow")
    mlflow = shlex.join([program, "ui", "--backend-store-uri", tracking_uri(config)])
    console.print(f"open MLflow: {mlflow}", highlight=False, soft_wrap=True)


def draw_story(report: Path, num_rows: int = 6) -> None:
    """Write `story.png`: a few images of an evaluation with the model's texts under each, signs first."""
    images = evaluation.read(report).images
    signs = [image for image in images if image.word][: num_rows // 2]
    chosen = signs + [image for image in images if not image.word][: num_rows - len(signs)]
    methods = list(images[0].methods)
    rows, captions = [], []
    for image in chosen:
        spoken = [image.methods[method] for method in methods]
        files = [image.files["input"], *(item.files.get("final") for item in spoken), image.files["truth"]]
        rows.append([None if file is None else np.asarray(Image.open(report / file)) for file in files])
        said = [_said(item.degradation, item.texts) for item in spoken]
        captions.append([_said(image.degradation, ()), *said, _said(None, image.captions or ())])
    image_grid(rows, ("input", *methods, "truth"), 192, captions).save(report / "story.png")


def _said(degradation: str | None, texts: Sequence[str | None]) -> str:
    """Degradation phrase and rough text, if there are any."""
    return "; ".join(part for part in (degradation, texts[0] if texts else None) if part)


def _series(steps: dict[int, dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    found = [(step, metrics[name]) for step, metrics in steps.items() if name in metrics]
    return [step for step, _ in found], [value for _, value in found]
