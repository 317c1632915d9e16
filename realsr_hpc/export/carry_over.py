"""Adapts a trained policy to other tokenizers of the same stride, as start weights for fine-tuning.

The layers are kept. The embedding row of a new image code is the mean of the rows of the old codes that occur at the
same positions of the same images, weighted by their frequency. A random projection of its codebook vector is added, so
that new codes with the same old ones get different rows. The row of a new text token is the mean of the rows of the old
tokens that spell it. The recipe must place images where the old one did (`vlcot.text_slots`), because the layers have
learnt these positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from realsr_hpc.export.weight_files import SINGLE, Aside, weight_files
from realsr_hpc.files import as_other_files
from realsr_hpc.tokenizer.trace import TraceTokenizer

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
APART = 0.3
"""Size of the projected codebook vector, in standard deviations of the old rows."""


def carry_over(
    policy: Path, old: TraceTokenizer, new: TraceTokenizer, images: Iterable[UInt8[Tensor, "B 3 s s"]], output: Path
) -> None:
    """Write `output/model.safetensors`: the weights of the export folder `policy`, with rows for the tokens of `new`.

    images: RGB 0..255 at the size of a prompt's image, encoded by both tokenizers; more images meet more codes.

    Raises:
        ValueError: before any image is taken, if `output` exists, another process writes it, or the export is damaged;
            also if the tokenizers have different strides.
    """
    with Aside(output) as folder:
        weights = {}
        for name, path in weight_files(policy).items():
            if "vqmodel" not in name:
                with safe_open(path, framework="pt") as file:
                    weights[name] = file.get_tensor(name).float()
        shares = code_shares(old, new, images)
        for name in ROWS:
            weights[name] = _rows(weights[name], old, new, shares)
        save_file(weights, folder / SINGLE, metadata={"format": "pt"})
        as_other_files(folder / SINGLE)


def code_shares(
    old: TraceTokenizer, new: TraceTokenizer, images: Iterable[UInt8[Tensor, "B 3 s s"]]
) -> Float[Tensor, "K J"]:
    """Matrix [new codes, old codes] with rows that sum to 1: how often old code j occurs at the positions of new code
    k. A new code that does not occur weighs all old codes equally."""
    if old.codec.downsample != new.codec.downsample:
        raise ValueError(f"image_tokenizer.downsample: {old.codec.downsample} and {new.codec.downsample} must be equal")
    num_old, num_new = old.codec.vocabulary.num_codes, new.codec.vocabulary.num_codes
    counts, size = torch.zeros(num_new * num_old), new.codec.config.lq_size_px
    for batch in images:
        codes = [torch.from_numpy(tokens.encode(batch, size)).flatten() for tokens in (old, new)]
        counts += torch.bincount(codes[1] * num_old + codes[0], minlength=len(counts))
    table = counts.view(num_new, num_old)
    table[table.sum(1) == 0] = 1.0
    return table / table.sum(1, keepdim=True)


def _rows(
    rows: Float[Tensor, "V H"], old: TraceTokenizer, new: TraceTokenizer, shares: Float[Tensor, "K J"]
) -> Float[Tensor, "W H"]:
    """Rows [new vocabulary, hidden]; zeros for tokens that have no counterpart."""
    before, after = old.codec.vocabulary, new.codec.vocabulary
    carried = torch.zeros(after.size, rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    codes = rows[_ids(before.num_codes, before.code_to_id)]
    vectors = new.image.quantize.codebook()
    vectors = (vectors - vectors.mean(0)) / vectors.std()
    projection = torch.randn(vectors.shape[1], rows.shape[1], generator=generator) / vectors.shape[1] ** 0.5
    carried[_ids(after.num_codes, after.code_to_id)] = shares @ codes + APART * codes.std() * (vectors @ projection)
    for token in (before.bos, before.pad, before.eos):
        carried[token] = rows[token]
    reserved = before.text_first - before.image_end
    carried[after.image_end : after.text_first] = rows[before.image_end : before.image_end + reserved]
    for token in range(after.num_text):
        spelled = old.codec.encode_text(new.codec.text.decode([token]))
        carried[after.text_first + token] = rows[spelled].mean(0) if spelled else 0.0
    return carried


def _ids(count: int, to_id) -> Int[Tensor, " N"]:
    return torch.tensor([to_id(code) for code in range(count)])
