"""Restores a folder of images: finished files are skipped, files that cannot be read are reported.

An input is finished if its result exists and records the SHA-256 of its content; a replaced input is restored again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from realsr_hpc.artifacts import restoration
from realsr_hpc.artifacts.stored import Damaged
from realsr_hpc.data.decoding import SUFFIXES, BrokenImage, opened
from realsr_hpc.files import Json, json_value, printable, sha256_of, write_atomically
from realsr_hpc.locks import sole_writer
from realsr_hpc.restore.image_files import Picture, find_images, read_picture, targets, write_picture
from realsr_hpc.restore.reasoning import write_reasoning
from realsr_hpc.restore.tiles import Blended, Restorer, RestoreSettings, count_tiles, restore_images


@dataclass
class RestoreTally:
    """Lists which files of a folder are done, skipped or failed; filled in during restoring."""

    done: list[str] = field(default_factory=list[str])
    skipped: list[str] = field(default_factory=list[str])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Reason, by file."""
    num_tiles: int = 0
    num_tiles_bicubic: int = 0
    """Tiles without an image from the model; they were upscaled bicubically."""

    def __str__(self) -> str:
        lines = [f"{len(self.done)} restored, {len(self.skipped)} already done, {len(self.failed)} failed"]
        if self.num_tiles_bicubic:
            lines.append(
                f"{self.num_tiles_bicubic} of {self.num_tiles} tiles are bicubic, because the model gave no image"
            )
        return printable("\n".join(lines + [f"  {name}: {reason}" for name, reason in self.failed.items()]))


@dataclass(frozen=True)
class _Work:
    """An input file that is being restored."""

    file: Path
    target: Path
    picture: Picture


def restore_folder(
    restorer: Restorer,
    source: Path,
    output: Path,
    settings: RestoreSettings,
    *,
    steps: bool = True,
    show_progress: bool = True,
) -> RestoreTally:
    """Restore every image of a folder (or one file) into `output`: NAME.png, NAME.json, with `steps` NAME.steps.jpg.

    Tiles of several small images are restored in one batch; each file is written as soon as it is done.

    Raises:
        ValueError: before anything is written, if there is no image, or if `output` is the folder of the inputs, cannot
            be written, is in use by another process, or has results of other settings or other files of these names.
    """
    root, files, unread = inputs_of(source, output)
    with sole_writer(output):
        return _restore_missing(restorer, targets(files, root, output), unread, output, settings, steps, show_progress)


def inputs_of(source: Path, output: Path) -> tuple[Path, list[Path], dict[str, str]]:
    """The inputs' folder, the files to restore, and by path the reason why other images are not read.

    Needs no model. ValueError if there is nothing to read, or if `output` is the folder of the inputs.
    """
    root = source if source.is_dir() else source.parent
    if output.resolve() == root.resolve():
        raise ValueError(
            f"output={output} is the folder of the input, where results would mix with inputs; name another"
        )
    files, unread = find_images(source, output)
    if not files:
        reasons = "; ".join(f"{name}: {why}" for name, why in unread.items())
        raise ValueError(
            f"input={source}: no images found; known endings: {', '.join(sorted(SUFFIXES))} {reasons}".strip()
        )
    return root, files, unread


def _restore_missing(
    restorer: Restorer,
    places: Mapping[Path, Path],
    unread: dict[str, str],
    output: Path,
    settings: RestoreSettings,
    steps: bool,
    show_progress: bool,
) -> RestoreTally:
    done = {file for file, target in places.items() if _is_done(file, target)}
    _claim(output, settings)
    report = RestoreTally(skipped=[str(file) for file in places if file in done], failed=unread)
    missing = {file: target for file, target in places.items() if file not in done}
    expected = {str(file): _expected_tiles(file, settings) for file in missing}
    with _progress(show_progress) as progress:
        task = progress.add_task("restoring", total=sum(expected.values()))
        for part in _parts(missing, settings, report):
            progress.update(task, total=sum(tiles for name, tiles in expected.items() if name not in report.failed))
            pixels = [work.picture.rgb for work in part]
            results = restore_images(restorer, pixels, settings, lambda count: progress.advance(task, count))
            for work, result in zip(part, results, strict=True):
                _write(work, result, settings, report, steps)
                if show_progress and str(work.file) in report.done:
                    progress.console.print(_progress_line(work, result), markup=False, highlight=False)
    return report


def _parts(missing: dict[Path, Path], settings: RestoreSettings, report: RestoreTally) -> Iterator[list[_Work]]:
    """Readable files, in parts whose tiles fill the batches of all workers; unreadable files are reported as failed."""
    part: list[_Work] = []
    waiting = 0
    for file, target in missing.items():
        try:
            picture = read_picture(file)
        except BrokenImage as error:
            report.failed[str(file)] = f"cannot be read ({error})"
            continue
        part.append(_Work(file, target, picture))
        waiting += count_tiles(picture.rgb.shape[0], picture.rgb.shape[1], settings)
        if waiting >= settings.batch_size * settings.workers:
            yield part
            part, waiting = [], 0
    if part:
        yield part


def _progress_line(work: _Work, result: Blended) -> str:
    """The progress line of a restored file."""
    count, named = len(result.tiles), result.tiles[0].degradation or "not well-formed"
    return printable(f"{work.target}: {count} tile{'s' if count > 1 else ''}, the first: {named}")


def _write(work: _Work, result: Blended, settings: RestoreSettings, report: RestoreTally, steps: bool) -> None:
    """Remove an older image, write the reasoning, then the image: an image that exists has its reasoning."""
    try:
        work.target.parent.mkdir(parents=True, exist_ok=True)
        work.target.unlink(missing_ok=True)
        write_reasoning(work.file, work.target, work.picture.rgb, result, settings.source, steps)
        write_picture(result.image, work.picture, work.target)
    except OSError as error:
        report.failed[str(work.file)] = f"its result cannot be written ({error.strerror or error})"
        return
    report.done.append(str(work.file))
    report.num_tiles += len(result.tiles)
    report.num_tiles_bicubic += sum(tile.bicubic for tile in result.tiles)


def _is_done(file: Path, target: Path) -> bool:
    """Whether `target` is the finished result of `file`. ValueError if it is another file's result or not a result."""
    if not target.exists():
        return False
    if not restoration.record_file(target).exists():
        raise ValueError(
            f"{target} was not written by realsr-hpc restore (no {target.stem}.json): choose another output"
        )
    try:
        stored = restoration.read(target)
        if stored.input_sha256 == sha256_of(file):
            return True
    except (Damaged, OSError):
        return False  # an unreadable input is reported when it is read
    if stored.input != os.path.abspath(file):
        raise ValueError(f"{target} is the result of {stored.input}, not of {file}: choose another output")
    return False


def _claim(output: Path, settings: RestoreSettings) -> None:
    """Record the settings in the folder. ValueError if it holds results of other settings."""
    path = output / restoration.SETTINGS_FILE
    wanted = {name: value for name, value in asdict(settings).items() if name not in ("batch_size", "workers")}
    if path.exists() and (held := _stored_settings(path)) != wanted:
        differing = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
        was = ", ".join(f"{name}={held.get(name)}" for name in differing)
        raise ValueError(f"output={output} holds results of other settings ({was}); choose an empty folder")
    write_atomically(path, json.dumps(wanted, indent=1))


def _stored_settings(path: Path) -> dict[str, Json]:
    try:
        held = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose an empty folder") from None
    return held if isinstance(held, dict) else {}


def _expected_tiles(file: Path, settings: RestoreSettings) -> int:
    """Number of tiles, from the file's header; 0 if it cannot be read."""
    try:
        with opened(file) as picture:
            return count_tiles(picture.height, picture.width, settings)
    except BrokenImage:
        return 0


class _Rate(ProgressColumn):
    """Recent tiles per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} tiles/s" if task.speed else "– tiles/s")


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, disable=not show)
