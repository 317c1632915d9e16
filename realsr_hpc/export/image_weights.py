"""The image tokenizer in an export: encoder and codes where transformers looks, the decoder beside.

`model.vqmodel.*` holds what `ChameleonVQVAE` has. `vq_decoder.safetensors` holds the rest, with the codebook as the
decoder uses it. transformers compares by distance; for a tokenizer that compares by angle the normalised codebook is
exported (the nearest unit vector is the same by both), and its raw form stays in the decoder's file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from realsr_hpc.config.schema import ImageTokenizerConfig
from realsr_hpc.export.folder import as_other_files, read_tensors
from realsr_hpc.tokenizer.image import ImageTokenizer

VQ_PREFIX = "model.vqmodel."
DECODER_FILE = "vq_decoder.safetensors"
_CODEBOOK = "quantize.embedding.weight"


def encoder_tensors(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Encoder, codebook and both 1x1 convolutions under transformers' names."""
    state = {name: value.detach().cpu() for name, value in tokenizer.state_dict().items()}
    state[_CODEBOOK] = tokenizer.quantize.codebook().detach().cpu()
    return {VQ_PREFIX + name: value for name, value in state.items() if not name.startswith("decoder.")}


def save_decoder(tokenizer: ImageTokenizer, folder: Path) -> None:
    """`vq_decoder.safetensors`: what the shipped `load_decoder` reads."""
    state = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    kept = {name: value for name, value in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
    kept["codebook"] = tokenizer.quantize.codebook().detach().cpu().contiguous()
    if tokenizer.config.normalised_codes:
        kept[_CODEBOOK] = state[_CODEBOOK]
    save_file({name: value.clone() for name, value in kept.items()}, folder / DECODER_FILE, metadata={"format": "pt"})
    as_other_files(folder / DECODER_FILE)


def load_from_export(folder: Path, config: ImageTokenizerConfig) -> ImageTokenizer:
    """The image tokenizer of an export folder, float32.

    ValueError when the folder has no decoder, or its shapes are not those of `config`.
    """
    decoder = folder / DECODER_FILE
    if not decoder.is_file():
        raise ValueError(
            f"{folder} has no {DECODER_FILE}: transformers' Chameleon carries no image decoder; take "
            "image_tokenizer.weights from where the decoder is published, or train one with recipe=tokenizer_tiny"
        )
    state = read_tensors(folder, VQ_PREFIX)
    beside = load_file(decoder)
    state |= {name: value for name, value in beside.items() if name != "codebook"}
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    wanted = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    faults = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if faults:
        name = faults[0]
        raise ValueError(
            f"{folder}: {len(faults)} tensors of the image tokenizer do not fit, first {name}: the folder has "
            f"{found.get(name)}, the recipe's image_tokenizer section wants {wanted.get(name)}; make them agree"
        )
    tokenizer.load_state_dict(state, assign=True)
    return tokenizer.requires_grad_(False).eval()
