"""Export a run to a Hugging Face folder: realsr-hpc export-hf run=RUN_DIR output=DIR [key=value ...]

checkpoint=RUN_DIR/checkpoints/step-N   this checkpoint instead of the newest
licence=ID          licence in the model card
dtype=bf16|fp32     round the policy's weights (default: as they are)
shard_mb=1000       largest size of a weights file, which is also the memory needed in addition to the weights
form=merged|peft    a whole model with adapters merged in, or the adapters of a run with model.lora alone, for `peft`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_arguments, read_count
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.tracking import recipe_of

DEFAULTS = {
    "run": None,
    "output": None,
    "checkpoint": None,
    "licence": None,
    "dtype": None,
    "shard_mb": "1000",
    "form": "merged",
}
LICENCE = re.compile(r"\w[\w .+()-]*")
"""A single line, because it is written to the YAML header of the model card."""
FORMS = ("merged", "peft")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or a run that cannot be exported."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        check(given)
        run = runfolder.find_run(runfolder.usual_root(), given["run"] or "")
        fits({**given, "run": str(run)}, lambda path: recipe_of(Path(path)))
        taken = _export(given, run, Path(given["output"] or ""))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given['output']}: {taken.name} of {given['run']}")
    return 0


def check(given: dict[str, str | None]) -> None:
    """Raise ValueError for arguments that are invalid for every run; called before anything is read, also by chains."""
    if not given["run"] or not given["output"]:
        raise ValueError("run=RUN_DIR and output=DIR are needed")
    if given["dtype"] not in (None, *DTYPES):
        raise ValueError(f"dtype={given['dtype']!r} is not one of {', '.join(DTYPES)}; leave it out to round nothing")
    if given["form"] not in FORMS:
        raise ValueError(f"form={given['form']!r} is not one of {', '.join(FORMS)}; leave it out for a whole model")
    read_count(given, "shard_mb", 1)
    if not LICENCE.fullmatch(given["licence"] or "mit"):
        raise ValueError(f"licence={given['licence']!r}: give its short name, such as mit or cc-by-nc-4.0")


def fits(given: dict[str, str | None], recipe_of: Callable[[str], RunConfig | None]) -> None:
    """Raise ValueError for arguments that do not suit the run's recipe, as far as `recipe_of` knows it; for chains."""
    run, checkpoint = Path(given["run"] or ""), given["checkpoint"]
    if checkpoint and runfolder.run_of_checkpoint(Path(checkpoint).resolve()) != run.resolve():
        raise _no_checkpoint_of(run, checkpoint)
    if (config := recipe_of(str(run))) is None:
        return
    if config.task == "tokenizer":
        raise ValueError(f"run={run}: it trained tokenizers, not a policy; export the run of a policy that uses them")
    if given["form"] == "peft" and config.model.lora is None:
        raise ValueError("form=peft: this run trained no adapters (model.lora is null); leave form out")


def _no_checkpoint_of(run: Path, checkpoint: str) -> ValueError:
    folder = runfolder.checkpoints(run)
    return ValueError(f"checkpoint={checkpoint}: not a checkpoint of {run}; name one of {folder}, or leave it out")


def _export(given: dict[str, str | None], run: Path, output: Path) -> Path:
    import torch

    from realsr_hpc.export import export_run

    path = Path(given["checkpoint"]) if given["checkpoint"] else None
    if path and not path.is_dir():
        raise _no_checkpoint_of(run, str(path))
    dtype = getattr(torch, DTYPES[given["dtype"]]) if given["dtype"] else None
    shard_bytes = read_count(given, "shard_mb", 1) * 10**6
    return export_run(
        run,
        output,
        checkpoint_path=path,
        licence=given["licence"],
        dtype=dtype,
        shard_bytes=shard_bytes,
        form=given["form"] or "merged",
    )
