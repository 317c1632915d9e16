"""`vqgan.ckpt` of Meta's Chameleon release: encoder, codebook and decoder; `vqgan.yaml` beside it holds the settings.

Its tensors have taming-transformers' names. Our image tokenizer uses the same names, so nothing is renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from realsr_hpc.files import Json, other_content
from realsr_hpc.formats.found import Found, FoundImage
from realsr_hpc.formats.place import Format, Place, Rotary, Signs
from realsr_hpc.formats.tensor_files import TensorFiles, state_of

NAME = "taming VQGAN (vqgan.ckpt)"
_UNDER = ("state_dict",)
_FIXED: dict[str, Json] = {
    "double_z": False,
    "attn_resolutions": [],
    "in_channels": 3,
    "out_ch": 3,
    "remap": None,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}
_SIZES = {"z_channels", "resolution", "ch", "ch_mult", "num_res_blocks", "dropout"}
"""Settings of `ddconfig` that follow from the shapes of the tensors, or that only training uses."""
SETTINGS: dict[str, Json] = {
    "normalised_codes": False,
    "attention": "middle",
    "decoder_norm": True,
    "decoder_patch_out": False,
    "decoder_output_shuffle": 1,
}


def recognise(place: Place) -> Signs:
    """Recognised by taming-transformers' keys in a pickle or safetensors file."""
    signs = Signs().add(place.content is not None, "one file of tensors (.ckpt, .pt, .pth, .bin, .safetensors)")
    wanted = "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight", "post_quant_conv.weight"
    return signs.add_keys(place.keys(*_UNDER), *wanted)


def open_vqgan(place: Place, rotary: Rotary | None) -> Found:
    """The tensors of the file; those that only training uses (`loss.*`) are reported as not read."""
    tensors = state_of(place.content, place.path, _UNDER)
    left = tuple(sorted(name for name in tensors if name.startswith("loss.")))
    files = TensorFiles([(place.path, {name: value for name, value in tensors.items() if name not in left})])
    image = FoundImage(
        NAME,
        place.path,
        files.specs,
        files.read,
        SETTINGS,
        tuple(_yaml_faults(place.path.with_suffix(".yaml"))),
        tuple(f"{name} (used in training only)" for name in left),
    )
    return Found(NAME, image=image)


def _yaml_faults(path: Path) -> list[str]:
    """Settings in vqgan.yaml that our tokenizer does not support.

    Sizes are not checked here, because the shapes of all tensors are compared.
    """
    if not path.is_file():
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({str(error).splitlines()[0]}); copy it again") from None
    params: Mapping[str, Json] = content if isinstance(content, dict) else {}
    for key in ("model", "params"):
        params = nested if isinstance(nested := params.get(key, params), dict) else {}
    inner = params.get("ddconfig")
    if not isinstance(inner, dict):
        raise ValueError(f"{path} {other_content(path) or 'holds no model.params.ddconfig; copy it again'}")
    given = {**params, **inner}
    unknown = sorted(key for key in inner if key not in _SIZES | _FIXED.keys() and inner[key] not in (None, False))
    faults = [f"{path.name}: ddconfig.{key} {inner[key]!r} (unknown here)" for key in unknown]
    return faults + [
        f"{path.name}: {key} {given[key]!r} (ours: {value!r})"
        for key, value in _FIXED.items()
        if key in given and given[key] != value
    ]


FORMAT = Format(NAME, recognise, open_vqgan)
