"""Weights files of image tokenizers: safetensors that name the architecture they were written for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from realsr_hpc.config.schema import ImageTokenizerConfig
from realsr_hpc.files import json_value, replacing
from realsr_hpc.formats.tensor_files import read_weights
from realsr_hpc.paths import resolve
from realsr_hpc.tokenizer.image import ImageTokenizer

FULL_PRECISION_LIMIT_BYTES = 6_000_000
"""Above this size the weights are stored as float16, so that the file stays small enough to commit."""
_NOT_ARCHITECTURE = {"weights"}


def _architecture(config: ImageTokenizerConfig) -> str:
    return json.dumps(config.model_dump(mode="json", exclude=_NOT_ARCHITECTURE), sort_keys=True)


def _check_written_for(stored: str, config: ImageTokenizerConfig, path: Path) -> None:
    """Raise ValueError if the file states another architecture; missing fields take their defaults."""
    try:
        written = _architecture(ImageTokenizerConfig.model_validate(json_value(stored)))
    except ValueError as error:  # pydantic's and json's errors are ValueErrors
        raise ValueError(f"image_tokenizer.weights: {path} names an unknown architecture ({error})") from None
    if written != _architecture(config):
        raise ValueError(
            f"image_tokenizer.weights: {path} was written for {written} but the recipe says "
            f"{_architecture(config)}: change the recipe's image_tokenizer section or the file"
        )


def load_image_tokenizer(config: ImageTokenizerConfig, device: torch.device | str) -> ImageTokenizer:
    """Frozen float32 tokenizer with the weights of `config.weights`.

    Raises ValueError if the file is missing, damaged or was written for another architecture.
    """
    path = resolve(config.weights)
    if not path.is_file():
        raise ValueError(
            f"image_tokenizer.weights names {path}, which does not exist: give a file written by "
            "save_image_tokenizer, or train one with recipe=tokenizer_tiny"
        )
    try:
        weights, notes = read_weights(path)
    except ValueError as error:
        raise ValueError(f"image_tokenizer.weights: {error}") from None
    if "image_tokenizer" in notes:
        _check_written_for(notes["image_tokenizer"], config, path)
    weights = {name: value.to(device).float() for name, value in weights.items()}
    tokenizer = ImageTokenizer(config).to(device)
    expected = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    faults = [k for k in expected.keys() | weights.keys() if k not in weights or weights[k].shape != expected.get(k)]
    if faults:
        raise ValueError(
            f"image_tokenizer.weights: {path} does not fit the recipe's image_tokenizer section at "
            f"{len(faults)} tensors, first {sorted(faults)[0]}: change the section or the file"
        )
    tokenizer.load_state_dict(weights)
    tokenizer.encoder.recognise_gathering()
    return tokenizer.requires_grad_(False).eval()


def save_image_tokenizer(tokenizer: ImageTokenizer, path: Path | str, full_precision: bool = False) -> None:
    """Write weights and architecture as safetensors: under a temporary name, flushed, then renamed to `path`.

    full_precision: keep the dtype also above FULL_PRECISION_LIMIT_BYTES, so that an import is exact.
    """
    path = Path(path)
    weights = {key: value.detach().cpu().contiguous() for key, value in tokenizer.state_dict().items()}
    size = sum(math.prod(value.shape) * 4 for value in weights.values())
    if size > FULL_PRECISION_LIMIT_BYTES and not full_precision:
        weights = {key: value.half() for key, value in weights.items()}
    with replacing(path) as aside:
        save_file(weights, aside, metadata={"image_tokenizer": _architecture(tokenizer.config), "format": "pt"})
