"""The image tokenizer in an export: encoder and codebook where transformers expects them, the decoder in its own file.

`model.vqmodel.*` has the tensors of `ChameleonVQVAE`. `vq_decoder.safetensors` has the rest, with the codebook as the
decoder uses it. transformers finds the nearest code by distance; for a tokenizer that finds it by angle, the normalised
codebook is exported (for unit vectors both give the same code), and the raw one is kept in the decoder's file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from realsr_hpc.config.schema import ImageTokenizerConfig
from realsr_hpc.files import as_other_files
from realsr_hpc.formats.found import VQ_PREFIX, FoundImage
from realsr_hpc.formats.own_export import DECODER_FILE
from realsr_hpc.tokenizer.image import ImageTokenizer

_CODEBOOK = "quantize.embedding.weight"


def encoder_tensors(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Encoder, codebook and both 1x1 convolutions by transformers' names, on the CPU."""
    state = {name: value.detach().cpu() for name, value in tokenizer.state_dict().items()}
    state[_CODEBOOK] = tokenizer.quantize.codebook().detach().cpu()
    return {VQ_PREFIX + name: value for name, value in state.items() if not name.startswith("decoder.")}


def save_decoder(tokenizer: ImageTokenizer, folder: Path) -> None:
    """Write `vq_decoder.safetensors`, which `load_decoder` of the shipped model class reads."""
    state = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    kept = {name: value for name, value in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
    kept["codebook"] = tokenizer.quantize.codebook().detach().cpu().contiguous()
    if tokenizer.config.normalised_codes:
        kept[_CODEBOOK] = state[_CODEBOOK]
    save_file({name: value.clone() for name, value in kept.items()}, folder / DECODER_FILE, metadata={"format": "pt"})
    as_other_files(folder / DECODER_FILE)


def image_shapes(config: ImageTokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the recipe's image tokenizer, without allocating it."""
    with torch.device("meta"):
        state = ImageTokenizer(config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def read_image(found: FoundImage, config: ImageTokenizerConfig) -> ImageTokenizer:
    """Read a tokenizer whose shapes were checked, in float32. ValueError if a tensor has NaN or infinite values."""
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    tokenizer.load_state_dict({name: found.read(name).float() for name in tokenizer.state_dict()}, assign=True)
    return tokenizer.requires_grad_(False).eval()
