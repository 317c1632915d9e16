"""Public weights among somebody's downloads, by the names under which their owners publish them; nothing is opened.

What the import itself recognises by its keys (`formats`) is guessed here from file names, config.json and headers, so
that it can be listed, with the command that converts it, on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import json_value, safetensors_header, weight_map

IMAGE_FILES = {"chameleon_f16": "vqgan.ckpt", "llamagen_f8": "vq_ds8_c2i.pt"}
"""File of the image tokenizer, by `vlcot.vocabulary`."""
TEXT_FILE = "text_tokenizer.json"
_VOCABULARY = {65536: "chameleon_f16", 73728: "llamagen_f8"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DECODER = "model.vqmodel.decoder."


@dataclass(frozen=True)
class Start:
    """A policy that was found, and the words that import it."""

    policy: Path
    kind: str
    image_tokenizer: Path | None
    text_tokenizer: Path | None
    missing: str
    """The file that it needs as well and that is not there; empty: none."""

    def command(self, config: RunConfig) -> str:
        """What to type for a recipe."""
        words = [f"source={self.policy}"]
        words += [f"image_tokenizer={self.image_tokenizer}"] if self.image_tokenizer else []
        words += [f"text_tokenizer={self.text_tokenizer}"] if self.text_tokenizer else []
        words += [f"recipe={config.name}", f"output={config.model.weights}"]
        return f"python tools/import_weights.py {' '.join(words)}"


def starts(folder: Path, config: RunConfig) -> list[Start]:
    """Every policy below `folder` that fits the recipe's vocabulary. ValueError when there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"downloads={folder} is no folder; name the one that your downloads lie in")
    vocabulary = config.vlcot.vocabulary
    image = next((path for path in sorted(folder.rglob(IMAGE_FILES[vocabulary]))), None)
    text = next((path for path in sorted(folder.rglob(TEXT_FILE))), None)
    return [
        _start(policy, kind, image, text, IMAGE_FILES[vocabulary])
        for policy, kind, fits in _policies(folder)
        if fits == vocabulary
    ]


def _policies(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """(folder, kind, vocabulary) of Meta's trees and of Hugging Face folders."""
    for params in sorted(folder.rglob("models/*/params.json")):
        if any(params.parent.glob("consolidated*.pth")):
            yield params.parents[2], "Meta's tree", "chameleon_f16"
    for path in sorted(folder.rglob("config.json")):
        if not any((path.parent / name).is_file() for name in _WEIGHTS):
            continue
        try:
            settings = json_value(path.read_text(encoding="utf-8"))
            fits = _VOCABULARY[settings["vocab_size"]] if settings["model_type"].startswith("chameleon") else ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # another model's; the import names what is wrong with one that is asked for
        yield path.parent, "Hugging Face folder", fits


def _start(policy: Path, kind: str, image: Path | None, text: Path | None, image_name: str) -> Start:
    inside = (policy / "tokenizer" / image_name).is_file() or _has_decoder(policy)
    named = [policy / name for name in ("tokenizer.json", TEXT_FILE, f"tokenizer/{TEXT_FILE}")]
    spoken = any(path.is_file() for path in named)
    missing = [image_name] if not inside and image is None else []
    missing += [TEXT_FILE] if not spoken and text is None else []
    return Start(policy, kind, None if inside else image, None if spoken else text, " and ".join(missing))


def _has_decoder(folder: Path) -> bool:
    """Whether the weights' index, or the header of one safetensors file, names an image decoder."""
    for name in _WEIGHTS[1::2]:
        if (folder / name).is_file():
            return any(key.startswith(_DECODER) for key in weight_map(folder / name) or {})
    whole = folder / _WEIGHTS[0]
    header = safetensors_header(whole)[0] if whole.is_file() else None
    return any(key.startswith(_DECODER) for key in header or {})
