"""Imports public weights as start weights: a policy's folder with tokenizer.json and image_tokenizer.safetensors.

Tensors are copied one by one from the memory-mapped source into shards; the folder is written under a temporary name
and renamed when complete. The result is also a Hugging Face folder; importing an export of this project reproduces it
bit by bit. It has no training state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc.config.load import from_yaml, to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.export import hf_config
from realsr_hpc.export.image_weights import encoder_tensors, image_shapes, read_image, save_decoder
from realsr_hpc.export.outgoing import write_configs, write_shipped_code
from realsr_hpc.export.text_files import combined, write_text_files
from realsr_hpc.export.weight_files import SHARD_BYTES, Aside, refuse_taken, write_json, write_weights
from realsr_hpc.files import check_sums, write_sums
from realsr_hpc.formats import Found, FoundImage, FoundPolicy, Rotary, open_image, open_source
from realsr_hpc.formats.fitting import image_faults, policy_faults, refuse, whole
from realsr_hpc.formats.found import VQ_PREFIX
from realsr_hpc.formats.place import read_json
from realsr_hpc.model.chunks import WeightShapes
from realsr_hpc.model.hf_mapping import hf_shapes
from realsr_hpc.paths import resolve
from realsr_hpc.runfolder import RECIPE
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import save_image_tokenizer
from realsr_hpc.tokenizer.whole_file import TokenizerTree, is_whole, names_of, read_tree, text_part
from realsr_hpc.vlcot.token_names import code_of, name_faults, num_text
from realsr_hpc.vlcot.vocabulary import Vocabulary, build_vocabulary

IMAGE_FILE, TEXT_FILE = "image_tokenizer.safetensors", "tokenizer.json"
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of all tensors."""
_BRINGS_IMAGE = "image_tokenizer=FILE (f = 16: vqgan.ckpt of Meta's Chameleon release; f = 8: LlamaGen's vq_ds8_c2i.pt)"
_BRINGS_TEXT = "text_tokenizer=FILE (text_tokenizer.json of Meta's Chameleon release, or a Hugging Face tokenizer.json)"


@dataclass(frozen=True)
class Sources:
    """Files and folders that the user names; None: as found in `source`, or named by the recipe."""

    source: Path
    image_tokenizer: Path | None = None
    text_tokenizer: Path | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    output: Path
    recognised: Sequence[str] = ()
    """What was recognised, read and missing, as sentences."""
    overrides: Sequence[str] = ()
    """Overrides that make the recipe start from the output; empty if it already names these files."""


@dataclass(frozen=True)
class _Parts:
    """The parts that will be written. Their shapes were checked, their tensors are not read yet."""

    policy: FoundPolicy | None
    image: FoundImage | None
    encoder: FoundImage | None
    """The encoder that came with a policy without a decoder."""
    text: Path | None
    vocabulary: Vocabulary | None


def import_weights(
    sources: Sources, output: Path, config: RunConfig | None = None, progress: Progress | None = None
) -> Imported:
    """Write the start weights to the folder `output`.

    config: the recipe whose shapes must fit; None: the recipe inside an export of this project.

    Raises:
        ValueError: naming what does not fit the recipe, is missing (and which file would supply it) or is damaged.
            Nothing is written then.
    """
    refuse_taken(output)
    if sources.source.is_dir():
        check_sums(sources.source)
    found = open_source(sources.source, sources.rotary)
    if config is None:
        config = _own_recipe(sources.source, found)
    parts = _check(sources, found, config)
    with Aside(output) as folder:
        if parts.image is not None:
            tokenizer = read_image(parts.image, config.image_tokenizer)
            save_image_tokenizer(tokenizer, folder / IMAGE_FILE, full_precision=True)
        if parts.policy is not None:
            tokenizer = None if parts.image is None else tokenizer
            _write_policy(folder, parts, config, tokenizer, progress)
            written = _with_files(config, output.resolve(), parts)
            (folder / RECIPE).write_text(to_yaml(written), encoding="utf-8")
        elif parts.text is not None:
            shutil.copyfile(parts.text, folder / TEXT_FILE)
        write_json(folder / "imported.json", _facts(sources, found, parts))
        write_sums(folder)
    return Imported(output, _said(found, parts), _overrides(config, output, parts))


def _own_recipe(source: Path, found: Found) -> RunConfig:
    if found.recipe is None:
        raise ValueError(f"{source} has no {RECIPE} (it is a {found.format}); add recipe=NAME of the same shape")
    return from_yaml(found.recipe)


def _check(sources: Sources, found: Found, config: RunConfig) -> _Parts:
    image, encoder = _image(sources, found, config)
    text, vocabulary = sources.text_tokenizer or found.text, None
    if found.policy is None and image is None:
        raise ValueError(f"{sources.source}: a {found.format} with neither a policy nor an image tokenizer")
    if found.policy is not None:
        if text is None:
            raise ValueError(f"{sources.source}: a {found.format} without a text tokenizer; add {_BRINGS_TEXT}")
        if not text.is_file():
            raise ValueError(f"text_tokenizer={text} does not exist")
        vocabulary, named = _vocabulary(text, found.policy, config)
        shapes = hf_shapes(WeightShapes.of(config.model, vocabulary.size))
        faults = [*policy_faults(found.policy, config, vocabulary, shapes), *named]
        refuse(found.policy.path, found.policy.format, config, list(dict.fromkeys(faults)))
    wanted = image_shapes(config.image_tokenizer)
    for part in (image, encoder):
        if part is not None:
            refuse(part.path, "image tokenizer", config, image_faults(part, config.image_tokenizer, wanted))
    if image is not None and found.image is not None and image is not found.image:
        _check_same_encoder(image, found.image, config)
    return _Parts(found.policy, image, encoder if image is None else None, text, vocabulary)


def _image(sources: Sources, found: Found, config: RunConfig) -> tuple[FoundImage | None, FoundImage | None]:
    """The image tokenizer to write (from the named file, the source, or the recipe) and the encoder in the source."""
    if sources.image_tokenizer is not None:
        return open_image(sources.image_tokenizer), found.image
    if found.image is not None and found.image.whole:
        return found.image, None
    if found.recipe is not None:
        raise ValueError(f"{sources.source}: an export of ours without vq_decoder.safetensors; copy it again")
    own = resolve(config.image_tokenizer.weights)
    return (open_image(own) if own.is_file() else None), found.image


def _vocabulary(text: Path, policy: FoundPolicy, config: RunConfig) -> tuple[Vocabulary, list[str]]:
    """The vocabulary layout, and faults of the names in the tokenizer's file and in the weights' vocabulary map."""
    codes = config.image_tokenizer.codebook_size
    first = build_vocabulary(config.vlcot, codes, 0).text_first
    tree = read_tree(text)
    names, beside = names_of(tree), dict(policy.names or {})
    if not _holds_all(tree, first, policy):
        vocabulary = build_vocabulary(config.vlcot, codes, len(names))
        names = {}  # text tokens alone, counted from 0: the weights' own map must name the image codes
    elif policy.path == text.parent and (policy.path / "realsr.json").is_file():
        count = read_json(policy.path / "realsr.json").get("num_text")
        if type(count) is not int or count < 0:
            raise ValueError(f"{policy.path / 'realsr.json'}: num_text is {count!r}, no number; copy the export again")
        vocabulary = build_vocabulary(config.vlcot, codes, count)
    else:
        vocabulary = build_vocabulary(config.vlcot, codes, num_text(names, first))
    sides = [(text, names), (policy.path / "config.json", beside)]
    naming = [(path, given) for path, given in sides if any(code_of(name) is not None for name in given)]
    if not naming:
        raise ValueError(
            f"{text}: no token is named IMGIMG...Z, and the weights bring no vocabulary_map: the ids of the image "
            f"codes are unknown; add {_BRINGS_TEXT}"
        )
    faults = [f"{path.name}: {fault}" for path, given in naming[:1] for fault in name_faults(given, vocabulary)]
    differing = sorted(name for name in names.keys() & beside.keys() if names[name] != beside[name])
    if differing:
        name = differing[0]
        faults.append(
            f"{text.name}: {name!r} has id {names[name]}, but {beside[name]} in the weights' vocabulary_map "
            f"({len(differing)} names differ); give the tokenizer of these weights"
        )
    return vocabulary, faults


def _holds_all(tree: TokenizerTree, text_first: int, policy: FoundPolicy) -> bool:
    """Whether a tokenizer file has ids for the whole vocabulary; a file of text tokens alone counts them from 0."""
    last = max(names_of(tree).values(), default=0)
    return is_whole(tree) or last + text_first >= policy.sizes["vocab_size"]


def _check_same_encoder(image: FoundImage, inside: FoundImage, config: RunConfig) -> None:
    """Raise ValueError if the named tokenizer's encoder differs from the one that came with the policy.

    Both are compared in the coarser of their dtypes.
    """
    for name in inside.tensors:
        ours, theirs = image.read(name), inside.read(name)
        if config.image_tokenizer.normalised_codes and name == "quantize.embedding.weight":
            ours, theirs = (torch.nn.functional.normalize(t.float(), dim=-1).half() for t in (ours, theirs))
        coarse = min(ours.dtype, theirs.dtype, key=lambda dtype: (dtype.itemsize, dtype == torch.float16))
        if not torch.allclose(ours.to(coarse).float(), theirs.to(coarse).float(), rtol=1e-2, atol=1e-6):
            raise ValueError(
                f"{image.path} is not the image tokenizer of {inside.path}: {name} differs there; give the one that "
                "the policy was trained with"
            )


def _write_policy(
    folder: Path, parts: _Parts, config: RunConfig, tokenizer: ImageTokenizer | None, progress: Progress | None
) -> None:
    policy, vocabulary = parts.policy, parts.vocabulary
    assert policy is not None and vocabulary is not None and parts.text is not None, "checked before"
    shapes = hf_shapes(WeightShapes.of(config.model, vocabulary.size))
    sizes = {name: torch.Size(shape).numel() * policy.tensors[name].dtype.itemsize for name, shape in shapes.items()}
    inside = {} if tokenizer is None else encoder_tensors(tokenizer)
    if parts.encoder is not None:
        inside = {VQ_PREFIX + name: parts.encoder.read(name) for name in parts.encoder.tensors}
    sizes |= {name: value.nbytes for name, value in inside.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, size in sizes.items():
            yield name, inside[name] if name in inside else whole(policy.read(name), shapes[name])
            done += size
            if progress is not None:
                progress(done, sum(sizes.values()))

    write_weights(folder, tensors(), sizes, SHARD_BYTES)
    if progress is not None:
        progress(sum(sizes.values()), sum(sizes.values()))  # the generator is not resumed after its last tensor
    tree = read_tree(parts.text)
    own = text_part(tree, vocabulary.text_first) if _holds_all(tree, vocabulary.text_first, policy) else tree
    text = combined(own, hf_config.special_tokens(vocabulary), vocabulary)
    write_configs(folder, config, vocabulary, text["model"]["vocab"], policy.tensors["lm_head.weight"].dtype)
    write_text_files(folder, text, config.model.max_sequence_tokens)
    if tokenizer is not None:
        save_decoder(tokenizer, folder)
        write_shipped_code(folder)


def _with_files(config: RunConfig, folder: Path, parts: _Parts) -> RunConfig:
    """The recipe with the tokenizers that were written to `folder` in place of its own."""
    image, text = config.image_tokenizer, config.text_tokenizer.model_copy(update={"path": str(folder / TEXT_FILE)})
    if parts.image is not None:
        image = image.model_copy(update={"weights": str(folder / IMAGE_FILE)})
    return config.model_copy(update={"image_tokenizer": image, "text_tokenizer": text})


def _overrides(config: RunConfig, output: Path, parts: _Parts) -> list[str]:
    files = {"image_tokenizer.weights": (config.image_tokenizer.weights, IMAGE_FILE if parts.image else None)}
    if parts.policy is not None:
        files["text_tokenizer.path"] = (config.text_tokenizer.path, TEXT_FILE)
        files["model.weights"] = (config.model.weights or "", "")
    return [
        f"{field}={output / name if name else output}"
        for field, (named, name) in files.items()
        if name is not None and (not named or resolve(named) != (output / name).resolve())
    ]


def _said(found: Found, parts: _Parts) -> list[str]:
    lines = []
    if parts.policy is not None and parts.vocabulary is not None:
        policy, vocabulary = parts.policy, parts.vocabulary
        lines.append(
            f"{policy.format}: {policy.parameters:,} parameters; vocabulary {vocabulary.size:,}: "
            f"{vocabulary.num_codes:,} image codes, {vocabulary.num_text:,} text tokens; rotary order {policy.rotary}"
        )
        lines += [f"not read: {name}" for name in policy.left]
    if parts.image is not None:
        lines.append(f"{parts.image.format}: {parts.image.parameters:,} parameters, {len(parts.image.tensors)} tensors")
        lines += [f"not read: {name}" for name in parts.image.left[:3]]
    else:
        lines.append(f"missing: the image tokenizer with its decoder; import again with {_BRINGS_IMAGE}")
    if parts.text is None:
        lines.append(f"missing: a text tokenizer; {_BRINGS_TEXT}")
    return lines


def _facts(sources: Sources, found: Found, parts: _Parts) -> dict[str, str | int | None]:
    """The content of imported.json: where the weights come from, without paths of this machine."""
    return {
        "format": parts.policy.format if parts.policy else found.format,
        "source": sources.source.name,
        "rotary": parts.policy.rotary if parts.policy else None,
        "parameters": parts.policy.parameters if parts.policy else None,
        "image_tokenizer": parts.image.format if parts.image else None,
        "text_tokenizer": parts.text.name if parts.text else None,
    }
