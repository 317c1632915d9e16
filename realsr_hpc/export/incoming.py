"""A Hugging Face Chameleon folder -> a run folder of ours, with a checkpoint to start from.

Ours (they carry recipe.yaml) come back bit by bit. Others (Meta's, Lumina's) need a recipe of their shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from realsr_hpc import checkpoint
from realsr_hpc.config.load import from_yaml, to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.export.folder import Aside, weight_files, write_json
from realsr_hpc.export.image_weights import DECODER_FILE, load_from_export
from realsr_hpc.export.outgoing import empty_policy, layout_here
from realsr_hpc.export.text_files import text_part
from realsr_hpc.files import check_sums
from realsr_hpc.model.hf_mapping import load_hf_weights
from realsr_hpc.parallel.groups import initialise
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.tokenizer.image import save_image_tokenizer
from realsr_hpc.vlcot.vocabulary import Vocabulary, build_vocabulary

IMAGE_FILE, TEXT_FILE = "image_tokenizer.safetensors", "text_tokenizer.json"


def import_folder(source: Path, output: Path, config: RunConfig | None = None) -> Path:
    """Write the run folder `output` (recipe.yaml, tokenizers, checkpoints/step-000000); returns the checkpoint.

    config: the recipe; None: the one inside `source`. One process. ValueError naming what does not fit.
    """
    check_sums(source)
    weight_files(source)
    config = config or _own_recipe(source)
    vocabulary = _check(source, config)
    groups = initialise(layout_here(config), config.seed)
    if groups.world_size > 1:
        raise ValueError("import_hf runs as one process: a checkpoint loads onto any layout later")
    with Aside(output) as folder:
        files = _write_tokenizers(source, folder, config, vocabulary)
        policy = empty_policy(config, groups, vocabulary.size)
        load_hf_weights(policy, source)
        state = {"step": 0, "data": {}, "counters": {}, "run_id": ""}
        path = checkpoint.save(folder / "checkpoints", 0, policy, None, state, checkpoint.Keep(last=1))
        (folder / "recipe.yaml").write_text(to_yaml(_with_files(config, output.resolve(), files)), encoding="utf-8")
    return output / path.relative_to(folder)


def _with_files(config: RunConfig, folder: Path, files: set[str]) -> RunConfig:
    """The recipe with the tokenizers of `folder` in place of its own, as far as they were written there."""
    image, text = config.image_tokenizer, config.text_tokenizer
    if IMAGE_FILE in files:
        image = image.model_copy(update={"weights": str(folder / IMAGE_FILE)})
    if TEXT_FILE in files:
        text = text.model_copy(update={"path": str(folder / TEXT_FILE)})
    return config.model_copy(update={"image_tokenizer": image, "text_tokenizer": text})


def _own_recipe(source: Path) -> RunConfig:
    if not (source / "recipe.yaml").is_file():
        raise ValueError(f"{source} has no recipe.yaml (not an export of ours); add recipe=NAME of the same shape")
    return from_yaml(source / "recipe.yaml")


def _check(source: Path, config: RunConfig) -> Vocabulary:
    """The recipe's sizes against config.json and the folder's tokenizer; ValueError lists every difference."""
    theirs = _json(source / "config.json")
    num_text = _num_text(source, config)
    vocabulary = build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, num_text)
    model = config.model
    ours = {
        "vocab_size": vocabulary.size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": kv_heads(model),
        "rms_norm_eps": model.norm_epsilon,
    }
    pairs = [(name, theirs.get(name), value) for name, value in ours.items()]
    differing = [f"{name} {found} (recipe: {wanted})" for name, found, wanted in pairs if found != wanted]
    rope = theirs.get("rope_theta", (theirs.get("rope_parameters") or {}).get("rope_theta"))
    if rope != model.rope_theta:
        differing.append(f"rope_theta {rope} (recipe: {model.rope_theta})")
    if theirs.get("swin_norm"):
        differing.append("swin_norm true (ours: Chameleon 7B's order of norms only)")
    if differing:
        raise ValueError(f"{source}/config.json does not fit recipe {config.name}: {'; '.join(differing)}")
    return vocabulary


def _num_text(source: Path, config: RunConfig) -> int:
    """Text tokens of the folder: what realsr.json says, or all ids from the layout's first text id on."""
    if (source / "realsr.json").is_file():
        return int(_json(source / "realsr.json")["num_text"])
    first = build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, 0).text_first
    ids = _json(source / "tokenizer.json")["model"]["vocab"].values()
    return sum(1 for token in ids if token >= first)


def _write_tokenizers(source: Path, folder: Path, config: RunConfig, vocabulary: Vocabulary) -> set[str]:
    """Names of the files written: the text tokenizer always, the image tokenizer where the source has its decoder."""
    write_json(folder / TEXT_FILE, text_part(_json(source / "tokenizer.json"), vocabulary))
    if (source / DECODER_FILE).is_file():
        save_image_tokenizer(load_from_export(source, config.image_tokenizer), folder / IMAGE_FILE)
        return {TEXT_FILE, IMAGE_FILE}
    return {TEXT_FILE}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; name a complete Hugging Face folder")
    return json.loads(path.read_text(encoding="utf-8"))
