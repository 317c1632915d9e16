"""List the files that a recipe needs, check them, and move them to a cluster without a network.

realsr-hpc stage-weights recipe=NAME [override ...]        each file with its path, state and source
    ... downloads=DIR   list public weights below DIR that fit the recipe, and the command that converts each
    ... collect=DIR     copy files found by name below DIR (your downloads) to their paths; list their checksums
    ... pack=FILE.tar   check all files and pack them with a SHA256SUMS; unpack with `tar -xf FILE.tar` in the project
    ... check=FILE      compare the files with such a SHA256SUMS

Exit code: 0 all files are there, 1 a file is missing or differs, 2 wrong usage.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realsr_hpc.config.arguments import read_with_overrides
from realsr_hpc.config.downloads import IMAGE_FILES, starts
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import Need, State, needs_of, read_listing, read_sums, state
from realsr_hpc.files import (
    SUMS_FILE,
    files_below,
    printable,
    publish,
    replacing,
    sha256_of,
    writable_folder,
    write_atomically,
)
from realsr_hpc.launch.damaged_files import faults_of
from realsr_hpc.locks import sole_writer
from realsr_hpc.paths import project_root

ACTIONS = {"downloads": "", "collect": "", "pack": "", "check": ""}


def main(arguments: list[str]) -> int:
    """Exit code: 0 all there, 1 something missing or different, 2 wrong usage."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
    try:
        actions, overrides = read_with_overrides(arguments, ACTIONS, __doc__)
        if not any(word.startswith("recipe=") for word in overrides):
            raise ValueError("recipe=NAME is needed")
        from realsr_hpc.config.load import compose_one

        config = compose_one(overrides)
        needs = needs_of(config)
        if actions["collect"]:
            collect(needs, Path(actions["collect"]), console)
        states: dict[Need, State] = {need: state(need) for need in needs}
        damaged = {need: fault for need, fault in faults_of(config).items() if states.get(need) == "there"}
        states |= dict.fromkeys(damaged, "damaged")
        show(states, console)
        if actions["downloads"]:
            show_downloads(Path(actions["downloads"]), config, console)
        faults = [damaged.get(need, f"{need.path}: {found}") for need, found in states.items() if found != "there"]
        if actions["check"]:
            faults += differing(Path(actions["check"]))
        for fault in faults:
            console.print(fault, style="red")
        if actions["pack"] and not faults:
            count = pack(needs, Path(actions["pack"]))
            console.print(f"{actions['pack']}: {count} files; unpack it in the project's folder there")
    except ValueError as error:
        console.print(f"error: {error}", style="red")
        return 2
    return 1 if faults else 0


def show(states: dict[Need, State], console: Console) -> None:
    """One row per file or folder."""
    table = Table("needed by", "must lie at", "size, MB", "state", "comes from")
    for column in table.columns:
        column.overflow = "fold"  # paths and addresses are there to be copied
    for need, found in states.items():
        size = sum(path.stat().st_size for path in need.files()) / 1e6
        table.add_row(need.purpose, shown(need.path), f"{size:.1f}" if size else "", found, need.origin)
    console.print(table)


def show_downloads(folder: Path, config: RunConfig, console: Console) -> None:
    """Print the public weights that were found, each with its command.

    ValueError if the folder is missing, or the recipe's vocabulary is not that of public weights.
    """
    if config.vlcot.vocabulary not in IMAGE_FILES:
        raise ValueError(f"downloads={folder}: {config.name} starts from no public weights; leave it out")
    found = starts(folder, config)
    if not found:
        console.print(f"{folder}: no policy of vocabulary {config.vlcot.vocabulary} below it")
    for start in found:
        summary = "; ".join([f"{start.policy}: {start.kind}", *start.against])
        console.print(printable(summary), highlight=False)
        if not start.against:
            for command in start.commands(config):
                console.print(printable(command), highlight=False)


def shown(path: Path) -> str:
    """The path, relative to the project's folder if it is below it."""
    return path.relative_to(project_root()).as_posix() if path.is_relative_to(project_root()) else str(path)


def collect(needs: list[Need], source: Path, console: Console) -> None:
    """Copy missing files from below `source`, and add the checksums of unlisted files to each weights folder.

    Outputs of import-weights are copied only as whole folders with SHA256SUMS, because a lone `tokenizer.json` may
    belong to any model. Raises ValueError if `source` is not a folder.
    """
    if not source.is_dir():
        raise ValueError(f"collect={source} is not a folder; name the one that your downloads lie in")
    files = files_below(source)
    folders = {folder for path in files for folder in path.parents if folder.is_relative_to(source)}
    found = {path.name: path for path in sorted({*files, *folders}, reverse=True)}
    for need in needs:
        origin = found.get(need.path.name)
        if need.converted and (origin is None or not (origin / SUMS_FILE).is_file()):
            continue
        if state(need) == "missing" and origin is not None and origin.resolve() != need.path:
            with sole_writer(need.path.parent, f"{need.purpose}: the folder"):
                copy(origin, need.path)
            console.print(printable(f"{origin} -> {shown(need.path)}"))
    for folder in {need.weights_dir for need in needs if need.weights_dir}:
        with sole_writer(folder, "weights_dir"):
            add_sums(folder, [need for need in needs if need.weights_dir == folder])


def copy(origin: Path, place: Path) -> None:
    """Copy a file or folder atomically."""
    if not origin.is_dir():
        with replacing(place) as aside:
            shutil.copy2(origin, aside)
        return
    aside = place.with_name(f".{place.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    shutil.copytree(origin, aside)
    publish(aside, place)


def add_sums(folder: Path, needs: list[Need]) -> None:
    """Add unlisted files to SHA256SUMS. Files that differ from their checksum are left for `state` to report."""
    sums = read_sums(folder)
    for need in needs:
        if state(need) == "unlisted":
            sums |= {path.relative_to(folder).as_posix(): sha256_of(path) for path in need.files()}
    if sums:
        lines = [f"{digest}  {name}" for name, digest in sorted(sums.items())]
        write_atomically(folder / SUMS_FILE, "\n".join(lines) + "\n")


def pack(needs: list[Need], target: Path) -> int:
    """Write the tar; returns the number of files. Raises ValueError for a file outside the project's folder."""
    files = {path for need in needs for path in need.files()}
    files |= {need.weights_dir / SUMS_FILE for need in needs if need.weights_dir}
    outside = [path for path in sorted(files) if not path.is_relative_to(project_root())]
    if outside:
        raise ValueError(f"{outside[0]} lies outside {project_root()}; put it below the project's folder to pack it")
    names = {path.relative_to(project_root()).as_posix(): path for path in sorted(files)}
    sums = "".join(f"{sha256_of(path)}  {name}\n" for name, path in names.items()).encode()
    writable_folder(target.absolute().parent, "pack: the folder")
    with replacing(target.absolute()) as aside, tarfile.open(aside, "w") as archive:
        for name, path in names.items():
            archive.add(path.resolve(), name)
        entry = tarfile.TarInfo(f"weights/{SUMS_FILE}")
        entry.size = len(sums)
        archive.addfile(entry, io.BytesIO(sums))
    return len(names)


def differing(listing: Path) -> list[str]:
    """Messages about missing and differing files of a SHA256SUMS with paths relative to the project's folder."""
    if not listing.is_file():
        raise ValueError(f"check={listing} does not exist; packing writes weights/{SUMS_FILE}")
    faults = []
    for name, digest in read_listing(listing).items():
        path = project_root() / name
        if not path.is_file():
            faults.append(f"{name}: missing")
        elif sha256_of(path) != digest:
            faults.append(f"{name}: differs from {listing}")
    return faults
