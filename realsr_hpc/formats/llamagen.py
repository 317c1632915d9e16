"""LlamaGen's image tokenizers, `vq_ds8_c2i.pt` and `vq_ds16_c2i.pt` (FoundationVision/LlamaGen, `VQModel`).

`conv_blocks.N.res.M` and `.attn.M` become taming's `down.N.block.M` and `.attn.M`. LlamaGen numbers the decoder's
blocks from the lowest resolution, taming from the highest. A file saved by LlamaGen's trainer also holds several copies
of the weights and the training options.
"""

from __future__ import annotations

from collections.abc import Mapping

from realsr_hpc.formats.found import Found, FoundImage
from realsr_hpc.formats.place import Format, Place, Rotary, Signs
from realsr_hpc.formats.tensor_files import TensorFiles, state_of
from realsr_hpc.formats.vqgan import SETTINGS

NAME = "LlamaGen VQ (vq_ds*.pt)"
_UNDER = ("model", "ema", "state_dict")
"""Keys that the weights may be stored under, in the order of preference. LlamaGen's own scripts use "model" to make the
codes that policies are trained on, and "ema", if present, for reconstructions."""
_USAGE = "quantize.codebook_used"
_MIDDLE = ("block_1", "attn_1", "block_2")


def recognise(place: Place) -> Signs:
    """Recognised by LlamaGen's keys in a single file."""
    signs = Signs().add(place.content is not None, "one file of tensors (.pt, .pth, .safetensors)")
    wanted = "encoder.conv_blocks.0.res.0.conv1.weight", "decoder.mid.0.conv1.weight", "post_quant_conv.weight"
    return signs.add_keys(place.keys(*_UNDER), *wanted)


def our_name(name: str, levels: int) -> str:
    """Our name of one of LlamaGen's tensors; levels: number of resolutions of encoder and decoder."""
    side, *rest = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    if rest[0] == "mid" and rest[1].isdigit():
        return ".".join([side, "mid", _MIDDLE[int(rest[1])], *rest[2:]])
    if rest[0] != "conv_blocks":
        return name
    number, kind = int(rest[1]), {"res": "block"}.get(rest[2], rest[2])
    place = ["down", str(number)] if side == "encoder" else ["up", str(levels - 1 - number)]
    return ".".join([side, *place, kind, *rest[3:]])


def open_llamagen(place: Place, rotary: Rotary | None) -> Found:
    """The tensors that LlamaGen's own code loads; the record of used codes is reported as not read."""
    tensors = state_of(place.content, place.path, _UNDER)
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.conv_blocks."))
    stored = {our_name(name, levels): name for name in tensors if name != _USAGE}
    renamed = {ours: tensors[name] for ours, name in stored.items()}
    files = TensorFiles([(place.path, renamed)], stored)
    attended = any(".attn." in name for name in renamed)
    settings = {
        **SETTINGS,
        "normalised_codes": _normalised(place.content),
        "attention": "lowest" if attended else "middle",
    }
    left = [f"{_USAGE} (a record of training)"] if _USAGE in tensors else []
    content = place.content if isinstance(place.content, Mapping) else {}
    states = [key for key in _UNDER if isinstance(content.get(key), Mapping)]
    left += [f"{key} (another state of the same tensors; {states[0]} is read)" for key in states[1:]]
    return Found(NAME, image=FoundImage(NAME, place.path, files.specs, files.read, settings, (), tuple(left)))


def _normalised(content: object) -> bool:
    """Whether codes are compared as unit vectors: from the trainer's options, else true, as in published tokenizers."""
    options = content.get("args") if isinstance(content, Mapping) else None
    return bool(getattr(options, "codebook_l2_norm", True))


FORMAT = Format(NAME, recognise, open_llamagen)
