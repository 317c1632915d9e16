"""Hugging Face folders of Chameleon models: facebook's, Lumina-mGPT's, PURE's, Anole's; safetensors or `.bin`.

They differ in details. config.json may lack `num_key_value_heads`. The q and k norms may have the shape [head_dim],
[1, head_dim] or one row per head. An image tokenizer in the folder (`model.vqmodel.*`) is usually only transformers'
encoder; some folders add the decoder. Folders that Anole's fork of transformers wrote have the rotary pairs of queries
and keys in Meta's order; they are recognised by the class name in config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from realsr_hpc.files import Json
from realsr_hpc.formats.found import VQ_PREFIX, Found, FoundImage, FoundPolicy, Spec
from realsr_hpc.formats.meta_chameleon import halves_of
from realsr_hpc.formats.place import Format, Place, Rotary, Signs, read_json
from realsr_hpc.formats.settings import mapping_of, setting_faults, sizes_of, token_ids
from realsr_hpc.formats.tensor_files import INDEXED, TensorFiles, open_folder
from realsr_hpc.formats.vqgan import SETTINGS

NAME = "Hugging Face Chameleon folder"
_KEYS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
_FORK = "ChameleonForCausalLM"
"""The class that Anole's fork of transformers writes into config.json; no release has it."""
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def plain(name: str) -> str:
    """A tensor's name without the prefix that later releases of transformers add to the language model."""
    return name.replace("model.language_model.", "model.", 1)


def recognise(place: Place) -> Signs:
    """Recognised by its files, then by the tensor names in the index or the weights."""
    signs = Signs().add(place.file("config.json") is not None, "config.json")
    weights = place.file(*(name for pair in INDEXED for name in pair))
    signs = signs.add(weights is not None, "model.safetensors, pytorch_model.bin or their index")
    if signs.against:
        return signs
    names = {plain(name) for name in open_folder(place.path).specs}
    tied = bool(read_json(place.path / "config.json").get("tie_word_embeddings"))
    for key in _KEYS:
        why = " (tie_word_embeddings true: our output matrix is separate)" if tied and "lm_head" in key else ""
        signs = signs.add(key in names, key + why)
    norm = "model.layers.0.self_attn.q_norm.weight"
    return signs.add(norm in names, f"{norm} (Chameleon normalises queries and keys; Llama and others do not)")


def open_hugging_face(place: Place, rotary: Rotary | None) -> Found:
    """The folder, with all weights memory-mapped.

    ValueError, naming the file, for a missing shard or malformed JSON.
    """
    settings = read_json(place.path / "config.json")
    files = open_folder(place.path)
    given = {plain(name): name for name in files.specs}
    inside = {n.removeprefix(VQ_PREFIX): kept for n, kept in given.items() if n.startswith(VQ_PREFIX)}
    left = [name for name in given if _BUFFER.fullmatch(name)]
    policy = {name: kept for name, kept in given.items() if not name.startswith(VQ_PREFIX) and name not in left}
    sizes = with_heads_of_the_weights(settings, files.specs, policy)
    order, known = _order(rotary, settings)
    found = FoundPolicy(
        format=NAME,
        path=place.path,
        tensors={name: files.specs[kept] for name, kept in policy.items()},
        read=lambda name: _read(files, policy, name, order),
        sizes=sizes,
        rotary=f"{order} ({known})",
        names=token_ids(settings),
        faults=(*setting_faults(settings), *_adapters(place)),
        left=(*(f"{name} (follows from rope_theta)" for name in left[:1]), *_beside(place)),
    )
    vq = mapping_of(settings, "vq_config")
    image = _image(files, inside, vq, place.path) if inside else None
    text = place.file("tokenizer.json", "text_tokenizer.json", "tokenizer/text_tokenizer.json")
    return Found(NAME, found, image, text)


def _beside(place: Place) -> list[str]:
    """Weight files that are not read because a preferred kind exists; transformers does the same."""
    kinds = [found.name for pair in INDEXED if (found := place.file(*pair)) is not None]
    return [f"{name} ({kinds[0]} holds the weights)" for name in kinds[1:]]


def _adapters(place: Place) -> list[str]:
    """Low-rank adapters in the folder, which transformers would add to the weights on loading."""
    found = place.file("adapter_config.json")
    remedy = "merge them into the weights, or move them to a folder for model.lora.weights"
    return [f"{found.name} beside the weights (low-rank adapters, which change the model: {remedy})"] if found else []


def _order(requested: Rotary | None, settings: Mapping[str, Json]) -> tuple[Rotary, str]:
    """Rotary order, and the evidence for it. Anole's fork stores Meta's order and permutes within attention."""
    if requested is not None:
        return requested, "as requested"
    named = settings.get("architectures")
    if isinstance(named, list) and _FORK in named:
        return "interleaved", f"{_FORK}: Anole's fork of transformers"
    return "halves", "as transformers computes"


def with_heads_of_the_weights(
    settings: Mapping[str, Json], specs: Mapping[str, Spec], kept: Mapping[str, str]
) -> dict[str, float]:
    """Sizes of config.json; a missing `num_key_value_heads` follows from the rows of the key projection."""
    sizes = sizes_of(settings)
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    rows = specs.get(kept.get("model.layers.0.self_attn.k_proj.weight", ""))
    if "num_key_value_heads" not in sizes and heads and hidden and hidden >= heads and rows is not None:
        sizes["num_key_value_heads"] = rows.shape[0] // (hidden // heads)
    return sizes


def _read(files: TensorFiles, kept: Mapping[str, str], name: str, order: Rotary) -> Tensor:
    if name not in kept:
        raise ValueError(f"there is no tensor {name} in the folder")
    tensor = files.read(kept[name])
    if order != "interleaved":
        return tensor
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj"):
        norm = files.specs[kept[name.replace("_proj", "_norm")]].shape[-1]
        return halves_of(tensor, tensor.shape[0] // norm)
    if part in ("q_norm", "k_norm"):
        # rotary pairs (2 i, 2 i + 1) -> (i, i + d / 2): [heads, d/2, 2] -> [heads, 2, d/2]
        return tensor.reshape(-1, tensor.shape[-1] // 2, 2).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _image(files: TensorFiles, inside: Mapping[str, str], vq: Mapping[str, Json], path: Path) -> FoundImage:
    faults = [f"vq_config.{key} {vq[key]!r}" for key in ("double_latent", "double_z") if vq.get(key)]
    attended = any(".attn." in name and ".mid." not in name for name in inside)
    return FoundImage(
        "image tokenizer of the folder",
        path,
        {name: files.specs[kept] for name, kept in inside.items()},
        lambda name: files.read(inside[name]),
        {**SETTINGS, "attention": "lowest" if attended else "middle"},
        tuple(faults),
    )


FORMAT = Format(NAME, recognise, open_hugging_face)
