"""Opens a model for restoring: from a run, one of its checkpoints, or one of our Hugging Face exports."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from realsr_hpc import runfolder
from realsr_hpc.config.load import from_yaml
from realsr_hpc.config.restoring import sampling
from realsr_hpc.config.schema import ParallelConfig, RunConfig
from realsr_hpc.files import SUMS_FILE, check_sums, sha256_of
from realsr_hpc.paths import resolve
from realsr_hpc.tracking import recipe_of

if TYPE_CHECKING:
    from realsr_hpc.rollout.policy_restorer import PolicyRestorer


def open_restorer(config: RunConfig, checkpoint_path: Path | None, *, with_steps: bool = True) -> PolicyRestorer:
    """Open a restorer in this process, without model parallelism; with several processes, each opens its own.

    checkpoint_path None: use the recipe's start weights. with_steps: also decode the rough and middle images.
    Raises ValueError if there are neither checkpoint nor start weights.
    """
    if checkpoint_path is None and config.model.weights is None:
        raise ValueError("model.weights is not set and there is no checkpoint: name a run that has one")
    # Megatron takes seconds to import, which callers that only read images should not pay.
    from realsr_hpc import checkpoint
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.process_groups import initialise
    from realsr_hpc.rollout.policy_restorer import PolicyRestorer
    from realsr_hpc.tokenizer.trace import TraceTokenizer

    precision = config.precision.model_copy(update={"fp8": "none", "rollout_fp8": False})
    config = config.model_copy(update={"parallel": ParallelConfig(), "precision": precision})
    if checkpoint_path is not None and config.model.lora is None:  # adapters need the start weights
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    groups = initialise(config.parallel, config.seed)
    tokens = TraceTokenizer.load(config, groups.device)
    policy = build_policy(config, groups, tokens.codec.vocabulary.size, trainable=False)
    if checkpoint_path is not None:
        checkpoint.load(checkpoint_path, policy, None, groups)
    return PolicyRestorer(policy, tokens, config, with_steps=with_steps)


def find_model(given: Mapping[str, str | None]) -> tuple[RunConfig, Path | None, str]:
    """Recipe, checkpoint folder and name of the model given by `run=`, `checkpoint=` or `export=`.

    The checkpoint is None for an export, whose recipe names its weights. Raises ValueError unless exactly one is given
    and it is complete.
    """
    named = [key for key in ("run", "checkpoint", "export") if given.get(key)]
    if len(named) != 1:
        raise ValueError("give one of run=RUN_DIR, checkpoint=RUN_DIR/checkpoints/step-N, export=DIR")
    if named == ["export"]:
        folder = Path(given["export"] or "").resolve()
        return read_export(folder), None, str(folder)
    config, path = find_checkpoint(given.get("run"), given.get("checkpoint"))
    return config, path, str(path)


def origin_of(name: str) -> str:
    """Identifies a model even if its folder is moved: by the folder's last names and a digest of its list of files.

    name: as `find_model` gives it; empty: unknown.
    """
    from realsr_hpc.checkpoint.integrity import MANIFEST

    folder = Path(name)
    parts = folder.parts[-3:] if runfolder.is_checkpoint(folder) else folder.parts[-1:]
    lists = [path for file in (MANIFEST, SUMS_FILE) if name and (path := folder / file).is_file()]
    return "/".join([*parts, *(f"sha256:{sha256_of(path)[:16]}" for path in lists)])


def find_checkpoint(run: str | None, checkpoint_folder: str | None) -> tuple[RunConfig, Path]:
    """Recipe and checkpoint folder of `run=RUN` (its newest checkpoint) or `checkpoint=RUN_DIR/checkpoints/STEP`.

    Raises ValueError if neither or both are given, there is no complete checkpoint, or the named one is damaged.
    """
    if (run is None) == (checkpoint_folder is None):
        raise ValueError("give either run=RUN_DIR or checkpoint=RUN_DIR/checkpoints/step-N")
    if checkpoint_folder is not None:
        path = Path(checkpoint_folder).resolve()
        if not (path.is_dir() and runfolder.is_checkpoint(path)):
            raise ValueError(
                f"checkpoint={checkpoint_folder}: not of the form RUN_DIR/checkpoints/step-N; name a run's checkpoint"
            )
        config = recipe_of(runfolder.run_of_checkpoint(path))
        from realsr_hpc.checkpoint import integrity

        integrity.refuse_damaged(path)
        return config, path
    run_dir = runfolder.find_run(runfolder.usual_root(), run or "")
    config = recipe_of(run_dir)
    from realsr_hpc import checkpoint

    newest = checkpoint.latest(runfolder.checkpoints(run_dir))
    if newest is None:
        raise ValueError(f"run={run_dir} has no complete checkpoint under checkpoints/; let it reach its first one")
    return config, newest


def read_export(folder: Path) -> RunConfig:
    """The recipe of an export, with the export as its start weights.

    ValueError if one of its files is damaged (`SHA256SUMS`) or missing.
    """
    if not (folder / runfolder.RECIPE).is_file():
        raise ValueError(f"export={folder} has no {runfolder.RECIPE}; name a folder that realsr-hpc export-hf wrote")
    check_sums(folder)
    config = from_yaml(folder / runfolder.RECIPE)
    files = {
        "image_tokenizer.weights": config.image_tokenizer.weights,
        "text_tokenizer.path": config.text_tokenizer.path,
    }
    source = shlex.quote(f"source={folder}")
    for field, file in files.items():
        if not resolve(file).is_file():
            raise ValueError(
                f"export={folder}: {field} of its recipe, {file}, is not on this machine; unpack the export's own "
                f"with realsr-hpc import-weights {source} output=DIR, then give export=DIR"
            )
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": str(folder)})})


def with_sampling(config: RunConfig, given: Mapping[str, str | None]) -> RunConfig:
    """The recipe with the fields of its section `restore` that `given` sets. ValueError for a value out of range."""
    return config.model_copy(update={"restore": sampling(config.restore, given)})
