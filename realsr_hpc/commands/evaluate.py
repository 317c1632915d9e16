"""Measure restoration quality: realsr-hpc evaluate run=RUN_DIR [against=start,RUN_DIR,EXPORT_DIR,IMAGE_DIR].

Also checkpoint=RUN_DIR/checkpoints/step-N, export=DIR, or images=DIR (any method's finished images) instead of run=.
The table always includes bicubic, and by default the run's start weights (against=start; against=none omits them).
The report goes to output=DIR, by default RUN_DIR/evaluation/STEP, and its numbers to the run's MLflow entry.
On several GPUs or cores: torchrun --nproc-per-node=N -m realsr_hpc.commands evaluate ...

  set=heldout          the recipe's held-out images (num_images=16, split=), or with data=DIR a test set: realsr,
                       drealsr, ost_val, div2k_val, reallq250, reallr200, or any folder as paired or unpaired
  pyiqa=lpips,dists,fid,niqe,musiq,maniqa-pipal,clipiqa,topiq_nr weights_dir=DIR     metrics that need staged weights
  crop_px=0            border left out of PSNR and SSIM
  draws=1              restorations per image; more than one adds their best, mean and worst, and the worst tenth
  candidates= choose= colour= overlap_px= temperature= image_top_k= ...   as in realsr-hpc restore
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_arguments, read_count
from realsr_hpc.config.load import nearest
from realsr_hpc.config.restoring import RESTORING, check_restoring, refuse_what_does_not_fit
from realsr_hpc.config.schema import ParallelConfig, RunConfig
from realsr_hpc.config.test_sets import refuse_unknown_set
from realsr_hpc.files import printable
from realsr_hpc.paths import resolve

if TYPE_CHECKING:
    from realsr_hpc.evaluate.methods import Method

DEFAULTS: dict[str, str | None] = {
    "run": None,
    "checkpoint": None,
    "export": None,
    "images": None,
    "against": "start",
    "set": "heldout",
    "data": None,
    "upscale": "4",
    "output": None,
    "num_images": "16",
    "split": None,
    "crop_px": "0",
    "draws": "1",
    "pyiqa": "lpips,dists,fid,niqe,musiq,maniqa-pipal,clipiqa,topiq_nr",
    **RESTORING,
}
Given = dict[str, str | None]
COUNTS = {"upscale": 1, "num_images": 1, "draws": 1, "crop_px": 0}
"""Integer arguments and their smallest values."""
MAX_UPSCALE = 64
SOURCES = ("run", "checkpoint", "export", "images")
TAKEN = ("input", "truth")
"""Names of subfolders of a report's `images/` that methods cannot have."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 1 written without some images or numbers, which are named, 2 nothing can be evaluated."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        check(given)
        report, run_dir, step = _evaluate(given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if report is None:  # another rank writes
        return 0
    print(report.markdown())
    if run_dir is not None:
        from realsr_hpc.tracking.results import log_results

        files = [report.folder / name for name in ("metrics.md", "metrics.csv", "grid.png", "worst.png")]
        fault = log_results(run_dir, step, report.summary(), files, f"evaluation/{report.set_name}")
        print(f"not in MLflow: {fault}" if fault else f"in MLflow: evaluate/{report.set_name}/METHOD/METRIC")
    print(f"{report.folder}: metrics.md, metrics.csv, grid.png, worst.png, images/")
    return 1 if report.skipped or report.lacking or report.absent else 0


def check(given: Given) -> None:
    """Raise ValueError for arguments that are invalid for every run; called before anything is read, also by chains."""
    for key, minimum in COUNTS.items():
        read_count(given, key, minimum)
    if read_count(given, "upscale") > MAX_UPSCALE:
        raise ValueError(f"upscale={given['upscale']} is above {MAX_UPSCALE}; give the set's factor, such as 4")
    check_restoring(given)
    if len([key for key in SOURCES if given[key]]) != 1:
        raise ValueError("give one of run=RUN_DIR, checkpoint=RUN_DIR/checkpoints/step-N, export=DIR, images=DIR")
    _refuse_what_would_be_lost(given)
    if given["data"]:
        refuse_unknown_set(given["set"])
        if given["split"]:
            raise ValueError(
                f"split={given['split']} chooses among the recipe's own images; with data=DIR leave it out"
            )
    elif given["set"] != "heldout" or given["images"]:
        raise ValueError(f"set={given['set']} needs data=DIR, the folder of the test set")


def _refuse_what_would_be_lost(given: Given) -> None:
    """ValueError for an option of something else than what is evaluated."""
    if given["data"] and given["num_images"] != DEFAULTS["num_images"]:
        raise ValueError(f"num_images={given['num_images']} goes without data=DIR, whose images are all taken")
    if not given["images"] and given["upscale"] != DEFAULTS["upscale"]:
        raise ValueError(f"upscale={given['upscale']} goes with images=DIR; a model's factor is its own")


def _refuse_without_model(given: Given, kinds: Collection[str]) -> None:
    """ValueError for an option of restoring where all images are finished ones."""
    options = {"draws": DEFAULTS["draws"], **RESTORING}
    lost = [key for key, usual in options.items() if key != "weights_dir" and given[key] != usual]
    if lost and given["images"] and not {"run", "checkpoint", "export"} & set(kinds):
        raise ValueError(f"{lost[0]}={given[lost[0]]} goes with a model that restores; finished images are as they are")


def fits(given: Given, recipe_of: Callable[[str], RunConfig | None]) -> None:
    """Raise ValueError for arguments that do not suit the models' recipes, as far as `recipe_of` knows them.

    For stages of a chain, whose runs may not exist yet.
    """
    named = next(given[key] for key in SOURCES if given[key]) or ""
    if given["images"] or (config := recipe_of(named)) is None:
        return
    refuse_what_does_not_fit(given, config)
    if given["split"]:
        _refuse_unknown_split(config, given["split"])
    for name in (given["against"] or "").split(","):
        if other := recipe_of(name):
            with _about_against(name):
                _refuse_other_factor(other, config.vlcot.upscale)


def _refuse_unknown_split(config: RunConfig, split: str) -> None:
    from realsr_hpc.data.manifest import read_manifest

    path = resolve(config.data.manifest)
    if path.is_file():  # launching says that it is missing
        read_manifest(path).split(split)


def _refuse_other_factor(other: RunConfig, upscale: int) -> None:
    if other.task == "tokenizer":
        raise ValueError("it trained tokenizers, not a policy: name a run that uses them")
    if other.vlcot.upscale != upscale:
        raise ValueError(f"its vlcot.upscale is {other.vlcot.upscale}, not {upscale}; compare models of one factor")


@contextmanager
def _about_against(name: str) -> Iterator[None]:
    """Prefix a ValueError from the block with the model of `against=` that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"against={name}: {error}") from None


def _evaluate(given: Given):
    from realsr_hpc.evaluate import BICUBIC, Bicubic, FinishedImages, Metrics, evaluate

    config, checkpoint, upscale = None, None, read_count(given, "upscale", 1)
    ours: dict[str, Method] = {}
    count, draws = read_count(given, "num_images", 1), read_count(given, "draws", 1)
    against = list(_kinds(given["against"] or ""))  # raises for unknown ones before a model is loaded
    _refuse_without_model(given, [kind for _, kind in against])
    crop_px = read_count(given, "crop_px")
    if given["images"]:
        folder = Path(given["images"]).resolve()
        ours[names_of_folders([folder], {BICUBIC, "start", *TAKEN})[folder]] = FinishedImages(folder)
        default, run_dir, step = folder.with_name(f"{folder.name}-evaluation"), None, 0
    else:
        config, checkpoint, default = _model(given)
        upscale = config.vlcot.upscale
        run_dir = runfolder.run_of_checkpoint(checkpoint) if checkpoint else None
        step = runfolder.step_of(checkpoint.resolve()) if checkpoint else 0
    cases, remarks = _cases(given, config, count, upscale)
    if config is not None:  # not before the set is known to be there: it may take minutes
        ours["ours"] = _restores(given, config, checkpoint)
    methods = {BICUBIC: Bicubic(upscale)}
    methods |= _others(against, {*methods, *ours, *TAKEN}, given, config, checkpoint, upscale)
    methods |= ours
    names = [name for name in (given["pyiqa"] or "").split(",") if name and name != "none"]
    metrics = Metrics(crop_px=crop_px, rewards=_rewards(config, step), pyiqa=names, weights_dir=given["weights_dir"])
    set_name = given["set"] or ""
    output = Path(given["output"] or (default if set_name == "heldout" else default / set_name))
    report = evaluate(
        methods,
        cases,
        output,
        metrics=metrics,
        set_name=set_name,
        remarks=remarks,
        world=_world(),
        draws=draws,
    )
    return report, run_dir, step


def _model(given: Given):
    """Recipe, checkpoint, and where the report goes."""
    from realsr_hpc.restore import find_model, with_sampling

    config, checkpoint, name = find_model(given)
    config = with_sampling(config, given)
    default = (
        runfolder.evaluations(runfolder.run_of_checkpoint(checkpoint)) / checkpoint.name
        if checkpoint
        else runfolder.evaluations(Path(name))
    )
    return config, checkpoint, default


def _restores(given: Given, config: RunConfig, checkpoint: Path | None):
    """A method that restores with a policy: images of the model's input size directly, others in tiles."""
    from realsr_hpc.evaluate.methods import finished
    from realsr_hpc.records import Case, RestoredImage
    from realsr_hpc.restore import open_with_options, restore_cases, restore_images

    restorer, settings = open_with_options(given, config, checkpoint)
    tile_shape = (settings.tile_px, settings.tile_px)

    def method(cases: Sequence[Case]) -> list[RestoredImage]:
        if any(case.lq.shape[:2] != tile_shape for case in cases):
            blended = restore_images(restorer, [case.lq for case in cases], settings)
            return [finished(item.image) for item in blended]
        return restore_cases(restorer, cases, settings)

    return method


def names_of_folders(folders: Sequence[Path], reserved: Collection[str]) -> dict[Path, str]:
    """A unique name for each folder: its own, preceded by as many parent folders as necessary.

    reserved: names that must not be used. Raises ValueError if a folder is given twice.
    """
    from realsr_hpc.data.naming import distinct

    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"against={twice[0]}: is given twice; name it once")
    options = []
    for folder in folders:
        joined = ["_".join(folder.parts[-count:]) for count in range(1, len(folder.parts))]
        options.append([*joined, quote(str(folder), "")])
    return dict(zip(folders, distinct(options, reserved), strict=True))


def _others(
    against: list[tuple[str, str]],
    taken: set[str],
    given: Given,
    config: RunConfig | None,
    checkpoint: Path | None,
    upscale: int,
) -> dict[str, Method]:
    """Methods of `against=` (the result of `_kinds`) by name; none of the names is in `taken`."""
    named = names_of_folders([Path(name).resolve() for name, kind in against if kind != "start"], {*taken, "start"})
    opened = _opened(against, given, config, checkpoint, upscale)
    return {("start" if name == "start" else named[Path(name).resolve()]): method for name, method in opened}


def _opened(
    against: list[tuple[str, str]], given: Given, config: RunConfig | None, checkpoint: Path | None, upscale: int
) -> Iterator[tuple[str, Method]]:
    """Yields name and opened method for each entry of `against`."""
    from realsr_hpc.evaluate import FinishedImages
    from realsr_hpc.restore import find_model, with_sampling

    for name, kind in against:
        folder = Path(name).resolve()
        with _about_against(name):
            if kind == "start":
                if config is not None and checkpoint is not None and config.model.weights is not None:
                    yield "start", _restores(given, config, None)
            elif kind == "images":
                yield name, FinishedImages(folder)
            else:
                other, path, _ = find_model({kind: name})
                _refuse_other_factor(other, upscale)
                yield name, _restores(given, with_sampling(other, given), path)


def _kinds(against: str) -> Iterator[tuple[str, str]]:
    """Yields each name with its kind: `start`, `run`, `checkpoint`, `export` or `images`. ValueError if unknown."""
    for name in against.split(","):
        folder = Path(name)
        if name == "start":
            yield name, name
        elif name not in ("", "none"):
            if not folder.is_dir():
                raise ValueError(
                    f"against={name}: no such folder{nearest(name, ['start', 'none'])}; give start, none, or the "
                    "folder of a run, an export, a checkpoint or finished images"
                )
            is_run = runfolder.recipe(folder).is_file() or runfolder.checkpoints(folder).is_dir()
            kinds = {
                "checkpoint": runfolder.is_checkpoint(folder.resolve()),
                "export": (folder / "config.json").is_file(),
                "run": is_run,
            }
            yield name, next((kind for kind, fits in kinds.items() if fits), "images")


def _cases(given: Given, config: RunConfig | None, count: int, upscale: int):
    """The cases to restore, and remarks for the report. Photographs that cannot be used are replaced by others."""
    from realsr_hpc.evaluate import cases_of, open_set

    if given["data"]:
        return open_set(given["set"] or "", Path(given["data"]), upscale)
    assert config is not None, "finished images need data=, which is checked"
    from realsr_hpc.data.loader import LQLoader

    loader = LQLoader(config, given["split"] or config.data.heldout_split, count, shuffle=False)
    try:
        cases = cases_of(loader.next())
        return cases, [f"left out: {printable(key)}: {why}" for key, why in loader.skipped.items()]
    finally:
        loader.close()


def _rewards(config: RunConfig | None, step: int):
    """The recipe's rewards with the weights of the checkpoint's step."""
    from realsr_hpc.rewards.mixture import RewardMixture

    if config is None:
        return None
    mixture = RewardMixture(config.rewards)
    mixture.at_step(max(1, step))
    return mixture


def _world():
    """This rank and the size of the world that torchrun started; a single rank without torchrun."""
    from realsr_hpc.evaluate import World

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    import torch.distributed as dist

    from realsr_hpc.parallel.process_groups import initialise
    from realsr_hpc.parallel.reduce import gather_objects

    groups = initialise(ParallelConfig(), 0)
    return World(groups.world_rank, groups.world_size, partial(gather_objects, group=dist.group.WORLD))
