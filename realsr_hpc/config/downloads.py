"""Finds published weights in a folder of downloads, by file names, config.json and file headers.

This works without torch, so that a login node can list them with the commands that convert them. Truncated files and
other models' weights are listed with their faults; only complete, fitting ones get a command. The import itself
recognises weights by their keys (`formats`).
"""

from __future__ import annotations

import pickletools
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.whole_files import file_fault
from realsr_hpc.files import Json, files_below, json_object, safetensors_header, weight_map

IMAGE_FILES = {"chameleon_f16": "vqgan.ckpt", "llamagen_f8": "vq_ds8_c2i.pt"}
"""File of the image tokenizer, by `vlcot.vocabulary`."""
TEXT_FILE = "text_tokenizer.json"
MODEL_TYPES = ("chameleon", "chameleon_xllmx")
ORDERS = {
    "interleaved": "trained with Anole's own fork of transformers",
    "halves": "trained with a release of transformers",
}
"""Orders of the rotary pairs, with the software that uses each, if the files do not state the order."""
CHOOSE = "choose " + " or ".join(f"rotary={order} ({whose})" for order, whose in ORDERS.items())
_VOCABULARY = {65536: "chameleon_f16", 73728: "llamagen_f8"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DECODER = "model.vqmodel.decoder."
_SIZES = {
    "num_layers": ("n_layers", "num_hidden_layers"),
    "hidden_size": ("dim", "hidden_size"),
    "num_heads": ("n_heads", "num_attention_heads"),
    "swin_norm": ("swin_norm", "swin_norm"),
}
"""Fields of the recipe's section model, with their names in params.json and in config.json."""


_TENSOR = ("GLOBAL", "BINGET", "LONG_BINGET")
"""Pickle opcodes at the beginning of a tensor: torch's function by name, or a reference to its first occurrence."""


@dataclass(frozen=True)
class Start:
    """A policy that was found, with the tokenizers to import it with."""

    policy: Path
    kind: str
    image_tokenizer: Path | None
    text_tokenizer: Path | None
    against: tuple[str, ...]
    """Reasons why it cannot be imported: missing or truncated files, sizes of another model; empty if it can."""
    orders: tuple[str, ...] = ()
    """Values of rotary= to choose from; empty: the files state the order."""

    def commands(self, config: RunConfig) -> list[str]:
        """The import command for a recipe, or one for each rotary order if the files do not state it."""
        return [self._command(config, order) for order in self.orders or ("",)]

    def _command(self, config: RunConfig, order: str) -> str:
        words = [f"source={self.policy}"]
        words += [f"image_tokenizer={self.image_tokenizer}"] if self.image_tokenizer else []
        words += [f"text_tokenizer={self.text_tokenizer}"] if self.text_tokenizer else []
        words += [f"rotary={order}"] if order else []
        words += [f"recipe={config.name}", f"output={config.model.weights}"]
        return f"python tools/import_weights.py {shlex.join(words)}"


@dataclass(frozen=True)
class _Policy:
    """A folder of weights, as its file names describe it."""

    folder: Path
    kind: str
    vocabulary: str
    settings: dict[str, Json]
    files: tuple[Path, ...]
    """Weight files, including those that an index names but that do not exist."""
    root: Path
    """Folder in which its tokenizers are looked for."""
    orders: tuple[str, ...] = ()


def starts(folder: Path, config: RunConfig) -> list[Start]:
    """All policies below `folder` with the recipe's vocabulary. ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"downloads={folder} is not a folder; name the one that holds your downloads")
    files = files_below(folder)
    image_name = IMAGE_FILES[config.vlcot.vocabulary]
    images = [path for path in files if path.name == image_name]
    texts = [path for path in files if path.name == TEXT_FILE]
    found = [*_trees(files), *_folders(files)]
    return [
        _start(policy, images, texts, image_name, config)
        for policy in found
        if policy.vocabulary == config.vlcot.vocabulary
    ]


def _trees(files: Sequence[Path]) -> Iterator[_Policy]:
    """Meta's trees. In a tree with several models, such as 7b and 30b, each model's own folder is named."""
    folders = {path.parent for path in files if path.name.startswith("consolidated") and path.suffix == ".pth"}
    for folder in sorted(folders & {path.parent for path in files if path.name == "params.json"}):
        tree = folder.parent.parent if folder.parent.name == "models" else folder
        alone = sum(other.parent == folder.parent for other in folders) == 1
        settings = _settings(folder / "params.json") | _settings(folder / "consolidate_params.json")
        nested = settings.get("model")
        settings |= nested if isinstance(nested, dict) else {}
        weights = sorted(folder.glob("consolidated*.pth"))
        parts = settings.get("model_parallel_size")
        if isinstance(parts, int) and parts > 1:
            weights = [folder / f"consolidated.{number:02d}.pth" for number in range(parts)]
        places = (folder, folder.parent.parent, folder.parent)
        root = next((place for place in places if (place / "tokenizer").is_dir()), folder)
        name = tree if alone else folder
        orders = tuple(ORDERS) if _is_renamed(weights[0]) else ()
        kind = f"Meta's tree, renamed from a Hugging Face folder: {CHOOSE}" if orders else "Meta's tree"
        yield _Policy(name, kind, "chameleon_f16", settings, tuple(weights), root, orders)


def _is_renamed(path: Path) -> bool:
    """Whether a tree was made from a Hugging Face folder (Anole's bin_to_pth.py).

    Then `rope.freqs` is no tensor, and no key states the order of the rotary pairs. The import checks the same with
    torch.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inner = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            words = (item for item in pickletools.genops(archive.read(inner)) if "PUT" not in item[0].name)
            return any(word == "rope.freqs" and next(words)[0].name not in _TENSOR for _, word, _ in words)
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return False  # `_fault` reports the file's fault


def _folders(files: Sequence[Path]) -> Iterator[_Policy]:
    """Hugging Face folders of Chameleon's class."""
    for path in files:
        named = [path.parent / name for name in _WEIGHTS if (path.parent / name).is_file()]
        if path.name != "config.json" or not named:
            continue
        settings = _settings(path)  # folders of other models are excluded; the import reports their faults
        size = settings.get("vocab_size")
        vocabulary = _VOCABULARY.get(size, "") if isinstance(size, int) else ""
        if settings.get("model_type") not in MODEL_TYPES:
            continue
        shards = (weight_map(named[0]) or {}).values() if named[0].suffix == ".json" else (named[0].name,)
        weights = sorted({path.parent / Path(name).name for name in shards}) or named[:1]
        yield _Policy(path.parent, "Hugging Face folder", vocabulary, settings, tuple(weights), path.parent)


def _settings(path: Path) -> dict[str, Json]:
    return (json_object(path.read_bytes()) or {}) if path.is_file() else {}


def _start(policy: _Policy, images: Sequence[Path], texts: Sequence[Path], image_name: str, config: RunConfig) -> Start:
    """The policy with its own tokenizers, which the import finds itself, else with the first complete ones found."""
    against = _other_sizes(policy, config) + [fault for path in policy.files if (fault := _fault(path))]
    image, text, inside = None, None, policy.root / "tokenizer" / image_name
    if inside.is_file():
        against += [fault] if (fault := file_fault(inside)) else []
    elif not _has_decoder(policy.folder):
        image, faults = _first_whole(images, image_name)
        against += faults
    named = [policy.root / name for name in ("tokenizer.json", TEXT_FILE, f"tokenizer/{TEXT_FILE}")]
    text_file = next((path for path in named if path.is_file()), None)
    if text_file is not None:
        against += [fault] if (fault := file_fault(text_file)) else []
    else:
        text, faults = _first_whole(texts, TEXT_FILE)
        against += faults
    return Start(policy.folder, policy.kind, image, text, tuple(against), policy.orders)


def _other_sizes(policy: _Policy, config: RunConfig) -> list[str]:
    differing = [
        f"model.{field} {value} (recipe: {ours})"
        for field, names in _SIZES.items()
        if isinstance(value := next((policy.settings[name] for name in names if name in policy.settings), None), int)
        and value != (ours := getattr(config.model, field))
    ]
    return [f"another model than recipe {config.name}'s: {', '.join(differing)}"] if differing else []


def _first_whole(paths: Sequence[Path], name: str) -> tuple[Path | None, list[str]]:
    """The first complete file; if there is none, the fault of the first file."""
    faults = {path: file_fault(path) for path in paths}
    whole = next((path for path, fault in faults.items() if not fault), None)
    reasons = [fault for fault in faults.values() if fault] or [f"{name} is not there"]
    return whole, [] if whole else reasons[:1]


def _fault(path: Path) -> str:
    return file_fault(path) if path.is_file() else f"{path} is not there"


def _has_decoder(folder: Path) -> bool:
    """Whether the index of the weights, or the header of a single safetensors file, names an image decoder."""
    for name in _WEIGHTS[1::2]:
        if (folder / name).is_file():
            return any(key.startswith(_DECODER) for key in weight_map(folder / name) or {})
    whole = folder / _WEIGHTS[0]
    header = safetensors_header(whole)[0] if whole.is_file() else None
    return any(key.startswith(_DECODER) for key in header or {})
