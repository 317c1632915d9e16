"""Checks before a submission, so that a job does not fail hours later for a reason that is visible now."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import Need, needs_of
from realsr_hpc.files import MIB, check_listed, check_sums, checksum_fault, checksum_of
from realsr_hpc.launch.damaged_files import damaged_files
from realsr_hpc.paths import resolve
from realsr_hpc.plan import plan, way_to_fit

READ_AT_LAUNCH_BYTES = 64 * MIB
"""Larger files are only checked for existence, so that launching takes about a second."""


def refuse_what_is_missing(configs: list[RunConfig], promised: Collection[Path] = ()) -> None:
    """Raise ValueError with one line for each entry of `missing`."""
    if absent := missing(configs, promised):
        raise ValueError("\n".join(absent))


def missing(configs: list[RunConfig], promised: Collection[Path] = ()) -> list[str]:
    """One line for each file that the recipes read and that is missing; if none is, for each damaged or unsuitable one.

    promised: folders that earlier stages of a chain will write; files in them are not checked.
    """
    read = {need for config in configs for need in needs_of(config)}
    read |= {_manifest_need(config) for config in configs}
    frozen = {config.sft.traces for config in configs if config.sft.traces}
    read |= {Need("sft.traces", resolve(name), "realsr-hpc freeze-traces") for name in frozen}
    read |= {
        Need("cluster.environment_file", resolve(config.cluster.environment_file), "your site")
        for config in configs
        if config.cluster.environment_file and config.cluster.kind == "slurm"
    }
    absent = sorted(
        f"{need.purpose}: {need.path} is not there; from: {need.origin}"
        for need in read
        if not need.files() and not any(need.path.is_relative_to(folder) for folder in promised)
    )
    if absent:
        absent.append("realsr-hpc stage-weights recipe=NAME lists and checks what a recipe needs")
    else:
        faults = (
            (*_manifest_faults(config), *_damaged(config, promised), *_differing(config, promised))
            for config in configs
        )
        absent = sorted({fault for found in faults for fault in found})
    return absent


def _manifest_need(config: RunConfig) -> Need:
    output = shlex.quote(f"output={Path(config.data.manifest).parent}")
    made = f"realsr-hpc prepare-data source=DIR {output}"
    return Need("data.manifest", resolve(config.data.manifest), made)


def _manifest_faults(config: RunConfig) -> Iterator[str]:
    """Faults of the recipe's manifest: damage, missing splits, captions or partners. Reads three columns, no image."""
    import pyarrow as pa  # takes 0.2 s, so not at import: --help should be fast
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path, data = resolve(config.data.manifest), config.data
    if fault := checksum_fault(path):
        yield f"data.manifest: {fault}"
        return
    try:
        with path.open("rb") as stream:  # pyarrow itself cannot open a path that is not valid UTF-8
            columns = ["split", "lq_path", "caption_final"]
            table = pq.read_table(stream, columns=columns, page_checksum_verification=True)
        splits = table["split"].unique().to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        yield f"data.manifest: {path}: no manifest, or a damaged one ({reason}); make one with realsr-hpc prepare-data"
        return
    for field in ("train_split", "heldout_split"):
        name = getattr(data, field)
        if name not in splits:
            yield (
                f"data.{field}: {name!r}: no photograph of {path} is in it; there are {', '.join(sorted(splits))}: "
                "name one, or prepare the data with another heldout_fraction"
            )
    lengths = pc.call_function("utf8_length", [table["caption_final"]])
    captioned = table.filter(pc.call_function("greater", [lengths, 0]))["split"].unique().to_pylist()
    if config.task == "sft" and config.sft.traces is None and data.train_split not in captioned:
        remedy = "write them with realsr-hpc prepare-data captions=FILE or captioner=DIR"
        yield f"data.train_split: {data.train_split!r}: no photograph of {path} has captions, to learn from; {remedy}"
    if data.mode == "paired" and table["lq_path"].null_count:
        count = table["lq_path"].null_count
        yield f"data.mode: paired: {count} of {len(table)} photographs of {path} have no partner; set unpaired"


def _damaged(config: RunConfig, promised: Collection[Path]) -> Iterator[str]:
    return (
        fault
        for path, fault in damaged_files(config)
        if not any(path.is_relative_to(folder) for folder in promised)  # an earlier stage will rewrite it
    )


def _differing(config: RunConfig, promised: Collection[Path]) -> Iterator[str]:
    """Start weights and tokenizers that differ from a `SHA256SUMS` beside them; the job checks large files."""
    checks: dict[str, tuple[Callable[[Path, float], None], str]] = {
        "text_tokenizer.path": (check_listed, config.text_tokenizer.path)
    }
    if config.task != "tokenizer":
        checks["image_tokenizer.weights"] = (check_listed, config.image_tokenizer.weights)
        if config.model.weights:
            checks["model.weights"] = (check_sums, config.model.weights)
    for field, (check, named) in checks.items():
        if any(resolve(named).is_relative_to(folder) for folder in promised):
            continue  # an earlier stage will rewrite it
        try:
            check(resolve(named), READ_AT_LAUNCH_BYTES)
        except (ValueError, OSError) as error:
            yield f"{field}: {error}"


def unchecked_manifests(configs: list[RunConfig]) -> list[str]:
    """Warnings about manifests without a checksum file, whose damage would not be detected."""
    paths = dict.fromkeys(resolve(config.data.manifest) for config in configs)
    return [
        f"data.manifest: {path} has no {checksum_of(path).name} beside it: damage to it would go unseen; "
        "realsr-hpc prepare-data writes one"
        for path in paths
        if path.is_file() and not checksum_of(path).is_file()
    ]


def refuse_what_cannot_fit(configs: list[RunConfig]) -> None:
    """ValueError for the first recipe whose plan exceeds its GPUs' memory."""
    for config in configs:
        estimate = plan(config)
        if estimate.fits is False:
            raise ValueError(
                f"cluster.gpu_memory_gib: {config.cluster.gpu_memory_gib}: {config.name} needs "
                f"{estimate.total_gib:.0f} GiB per GPU; {_remedy(config)} (null for gpu_memory_gib: submit anyway)"
            )


def _remedy(config: RunConfig) -> str:
    way = [override for knob in way_to_fit(config) for override in knob.overrides]
    return f"it fits with {' '.join(way)}" if way else "no layout makes this recipe fit: use larger or more GPUs"
