"""Turn folders of photographs or WebDataset tars into a checked manifest; repeating the command continues it.

realsr-hpc prepare-data source=DIR_OR_TAR output=DIR [key=value ...]

captions=FILE.jsonl    existing captions, tags, splits and low-quality partners
captioner=DIR          transformers image-to-text model for photographs without captions
tagger=captions|folder|DIR   tags from the captions' words, from the folder's name, or by an image-classification model
heldout_fraction=.1    share held out from training, of photographs whose split no note and no folder gives
num_threads=N          photographs examined in parallel (default: the number of available cores)
device=cpu|cuda        where captioner and tagger run
shard=k/n              examine and describe every n-th photograph only, as task k of a Slurm array
                       (slurm/prepare_data.sbatch); the same command without shard= then writes the manifest
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from realsr_hpc.config.arguments import read_arguments, read_count, read_number, read_shard
from realsr_hpc.files import printable

DEFAULTS = {
    "source": None,
    "output": None,
    "captions": None,
    "captioner": None,
    "tagger": None,
    "heldout_fraction": "0.1",
    "num_threads": str(len(os.sched_getaffinity(0))),
    "device": "cpu",
    "shard": None,
}


def main(arguments: list[str]) -> int:
    """Returns 0 if prepared, 1 if some files or notes were left out (they are named), 2 for invalid arguments or data.

    A shard returns 0 also with files left out, so that jobs depending on it start; the final command reports them.
    """
    console = Console(soft_wrap=True, markup=False, emoji=False)
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        absent = [key for key in ("source", "output") if not given[key]]
        if absent:
            raise ValueError(f"{absent[0]} is missing; give {absent[0]}=DIR")
        report = run(given, console)
    except ValueError as error:
        console.print(f"error: {printable(error)}", style="red")
        return 2
    show(report, console)
    return 0 if report.is_clean or report.manifest is None else 1


def run(given: dict[str, str | None], console: Console):
    """Prepare with a progress bar."""
    from realsr_hpc.prepare.build_manifest import prepare

    options = read_options(given)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("photographs")
        return prepare(
            Path(str(given["source"])),
            Path(str(given["output"])),
            options,
            on_photograph=lambda done, total: progress.update(task, completed=done, total=total),
        )


def read_options(given: dict[str, str | None]):
    """The arguments as `PrepareOptions`, with their models loaded. Raises ValueError naming the invalid argument."""
    from realsr_hpc.prepare.build_manifest import PrepareOptions
    from realsr_hpc.prepare.describe import Captioner, ClassTagger

    tagger, device = given["tagger"], str(given["device"])
    return PrepareOptions(
        captions=Path(given["captions"]) if given["captions"] else None,
        heldout_fraction=read_number(given, "heldout_fraction", "give a share such as 0.1"),
        captioner=Captioner(Path(given["captioner"]), device) if given["captioner"] else None,
        tagger=ClassTagger(Path(tagger), device) if tagger and tagger not in ("captions", "folder") else tagger,
        num_threads=read_count(given, "num_threads", 1),
        shard=read_shard(given) if given["shard"] else None,
    )


def show(report, console: Console) -> None:
    """Print the result and everything that was left out."""
    where = report.manifest or "shard done (the same command without shard= writes the manifest)"
    console.print(f"{printable(where)}: {len(report.entries)} photographs, {report.splits}")
    lacking = sorted({"train", "heldout"} - set(report.splits)) if report.manifest and report.entries else []
    if lacking:
        remedy = "give another heldout_fraction; recipes read both splits"
        console.print(f"no photograph is in split {lacking[0]}: {remedy}", style="yellow")
    if report.reused:
        console.print(f"examined before: {report.reused}")
    if report.without_captions:
        console.print(f"without captions: {report.without_captions}")
    for group in report.duplicates[:20]:
        console.print(f"look alike: {', '.join(group)}")
    for title, found in (("left out", report.faults), ("passed over", report.passed_over)):
        if found:
            kinds = dict(Counter(why.split(":")[0] for why in found.values()))
            console.print(f"{title}: {kinds}", style="yellow")
        for path, why in list(found.items())[:20]:
            console.print(f"  {path}: {why}", style="yellow")
    if max(len(report.faults), len(report.passed_over), len(report.duplicates)) > 20:
        console.print("  ... the rest is in report.json beside the manifest")
