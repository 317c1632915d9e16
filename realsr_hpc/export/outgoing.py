"""Exports a run or a policy in memory as a folder that transformers can load."""

from __future__ import annotations

import collections
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from realsr_hpc import checkpoint, runfolder
from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.schema import ParallelConfig, RunConfig
from realsr_hpc.export import hf_config
from realsr_hpc.export.adapter import export_adapter
from realsr_hpc.export.card import model_card
from realsr_hpc.export.image_weights import encoder_tensors, save_decoder
from realsr_hpc.export.recipe import portable
from realsr_hpc.export.text_files import combined, write_text_files
from realsr_hpc.export.weight_files import SHARD_BYTES, Aside, refuse_taken, write_json, write_weights
from realsr_hpc.files import write_sums
from realsr_hpc.model import lora
from realsr_hpc.model.hf_mapping import hf_names, hf_shape, hf_tensors
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.parallel.process_groups import ProcessGroups, initialise
from realsr_hpc.paths import resolve
from realsr_hpc.runfolder import RECIPE
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.tokenizer.whole_file import TokenizerTree, read_text_tree
from realsr_hpc.tracking import recipe_of
from realsr_hpc.tracking.results import read_results
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.vlcot.vocabulary import Vocabulary

_SHIPPED = Path(__file__).parent / "shipped"
_CARD_METRICS = ("heldout/", "rewards/")


def export_policy(
    policy: Policy,
    config: RunConfig,
    tokens: TraceTokenizer,
    output: Path,
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    licence: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a policy in memory to the folder `output`. Collective: every rank calls it, world rank 0 writes.

    Adapters are merged into the weights. ValueError if `output` exists or the text tokenizer does not fit.

    step, metrics, licence: for the model card. dtype: round the weights to it; None: an import restores them exactly.
    """
    config = without_adapters(config)
    kept = next(policy.parameters()).dtype if dtype is None else dtype
    weights = _rounded(policy, kept)
    if policy.groups.is_main:
        vocabulary = tokens.codec.vocabulary
        text = _text_tree(config, vocabulary)
        image = encoder_tensors(tokens.image)
        sizes = {name: math.prod(hf_shape(name, policy.shapes)) * kept.itemsize for name in hf_names(policy.shapes)}
        sizes |= {name: value.nbytes for name, value in image.items()}
        with Aside(output) as folder:
            write_weights(folder, itertools.chain(weights, image.items()), sizes, shard_bytes)
            save_decoder(tokens.image, folder)
            write_configs(folder, config, vocabulary, text["model"]["vocab"], kept)
            write_text_files(folder, text, config.model.max_sequence_tokens)
            write_shipped_code(folder)
            (folder / RECIPE).write_text(to_yaml(portable(config)), encoding="utf-8")
            card = model_card(config, step=step, metrics=metrics or {}, licence=licence)
            (folder / "README.md").write_text(card, encoding="utf-8")
            write_sums(folder, leave_out=("README.md",))  # users may edit the card
    else:
        collections.deque(weights, maxlen=0)  # iterates to take part in the collective gathering
    if dist.is_initialized():
        dist.barrier()


def _text_tree(config: RunConfig, vocabulary: Vocabulary) -> TokenizerTree:
    """The recipe's text tokenizer as a tree of JSON, with the special tokens of the whole vocabulary added."""
    own = read_text_tree(resolve(config.text_tokenizer.path), vocabulary.text_first)
    return combined(own, hf_config.special_tokens(vocabulary), vocabulary)


def _rounded(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and whole tensor in `dtype` on world rank 0, nothing on the others. Collective."""
    merged = None if policy.lora is None else lora.merging(policy)
    for name, value in hf_tensors(policy, merged):
        if value is not None:
            yield name, value.to(dtype)


def write_shipped_code(folder: Path) -> None:
    """Copy the source files of the model class, which can generate images, and of the processor."""
    for file in hf_config.CODE_FILES:
        shutil.copyfile(_SHIPPED / file, folder / file)


def write_configs(
    folder: Path, config: RunConfig, vocabulary: Vocabulary, names: dict[str, int], dtype: torch.dtype
) -> None:
    """Write config.json, generation_config.json and realsr.json. names: the vocabulary map."""
    from transformers import ChameleonConfig, GenerationConfig

    arguments = hf_config.model_config(config, vocabulary, names, str(dtype).removeprefix("torch."))
    ChameleonConfig(**arguments).save_pretrained(folder)
    GenerationConfig(**hf_config.generation_config(config, vocabulary)).save_pretrained(folder)
    write_json(folder / "realsr.json", hf_config.trace_config(config, vocabulary))


def export_run(
    run_dir: Path,
    output: Path,
    *,
    checkpoint_path: Path | None = None,
    licence: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    form: str = "merged",
) -> Path:
    """Export a run's newest complete checkpoint, or the named one; returns the checkpoint that was used.

    Runs in one process, or under torchrun in as many as the recipe's layout needs.

    form: `merged` for a whole model, `peft` for the trained adapters alone. The other arguments are those of
    `export_policy`.

    Raises:
        ValueError: if there is no complete checkpoint, or `output` exists.
    """
    refuse_taken(output)
    config = recipe_of(run_dir)
    groups = initialise(layout_here(config), config.seed)
    path = checkpoint_path or checkpoint.resume_path(runfolder.checkpoints(run_dir), groups)
    if path is None:
        raise ValueError(f"run={run_dir} has no complete checkpoint under checkpoints/; let it reach its first one")
    if checkpoint_path is not None:
        checkpoint.refuse_damaged(checkpoint_path, groups)
    tokens = TraceTokenizer.load(config, groups.device)
    policy = empty_policy(config, groups, tokens.codec.vocabulary.size)
    state = checkpoint.load(path, policy, None, groups)
    if form == "peft":
        export_adapter(policy, config, output, dtype)
        return path
    metrics = last_metrics(run_dir, state.step)
    export_policy(
        policy,
        config,
        tokens,
        output,
        step=state.step,
        metrics=metrics,
        licence=licence,
        dtype=dtype,
        shard_bytes=shard_bytes,
    )
    return path


def layout_here(config: RunConfig) -> ParallelConfig:
    """The recipe's layout if a launcher started several processes, else one process; checkpoints fit any layout."""
    return config.parallel if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ParallelConfig()


def empty_policy(config: RunConfig, groups: ProcessGroups, vocab_size: int) -> Policy:
    """A policy to load a checkpoint into, in the layout of this process group and without FP8.

    Start weights are read only for runs with adapters, whose checkpoints do not contain them; otherwise parameters are
    uninitialised.
    """
    adapted = config.model.lora is not None
    plain = config.model_copy(
        update={
            "parallel": layout_here(config),
            "precision": config.precision.model_copy(update={"fp8": "none", "rollout_fp8": False}),
            "model": config.model if adapted else config.model.model_copy(update={"weights": None}),
        }
    )
    return build_policy(plain, groups, vocab_size, trainable=False, filled=adapted)


def without_adapters(config: RunConfig) -> RunConfig:
    """The recipe of a model whose adapters are merged into its weights."""
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})


def last_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """For the model card: the last value up to `step` of each held-out and reward metric, and evaluations of `step`."""
    values: dict[str, float] = {}
    for logged, metrics in metrics_by_step(run_dir).items():
        if logged <= step:
            values |= {name: value for name, value in metrics.items() if name.startswith(_CARD_METRICS)}
    for found in read_results(run_dir):  # of other steps: numbers of other weights
        if found.step == step:
            values |= found.metrics
    return values
