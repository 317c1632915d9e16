"""Checks that weights fit a recipe, both when they are imported and when `model.weights` names them.

Sizes, settings, tensor shapes and token names are compared before any tensor is read. The error lists every difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from realsr_hpc.config.schema import ImageTokenizerConfig, RunConfig
from realsr_hpc.formats.found import FoundImage, FoundPolicy, Shape
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.vlcot.token_names import code_of, name_faults
from realsr_hpc.vlcot.vocabulary import Vocabulary

_MOST = 6
_FIELDS = {
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "rms_norm_eps": "model.norm_epsilon",
    "rope_theta": "model.rope_theta",
    "swin_norm": "model.swin_norm",
    "vocab_size": "vlcot.vocabulary",
}


def policy_faults(
    found: FoundPolicy, config: RunConfig, vocabulary: Vocabulary, wanted: Mapping[str, Shape]
) -> list[str]:
    """Every difference between a policy and the recipe.

    wanted: names and shapes of the tensors of the recipe's model, in Hugging Face's format.
    """
    sizes = _size_faults(found.sizes, config, vocabulary.size)
    # If a size differs, nearly every tensor has another shape: only the cause is reported.
    tensors = [] if sizes else _tensor_faults(found, wanted)
    names = found.names or {}
    named = name_faults(names, vocabulary) if any(code_of(name) is not None for name in names) else []
    return [*sizes, *found.faults, *tensors, *named]


def _size_faults(sizes: Mapping[str, float], config: RunConfig, vocab_size: int) -> list[str]:
    model = config.model
    ours: dict[str, float] = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": kv_heads(model),
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "swin_norm": model.swin_norm,
    }
    return [
        f"{_FIELDS[name]}: {name} {sizes.get(name)} (recipe: {value})"
        for name, value in ours.items()
        if sizes.get(name) != value
    ]


def _tensor_faults(found: FoundPolicy, wanted: Mapping[str, Shape]) -> list[str]:
    missing = [name for name in wanted if name not in found.tensors]
    extra = sorted(name for name in found.tensors if name not in wanted)
    faults = [f"it has no tensor {_some(missing)}"] if missing else []
    faults += [f"it has a tensor {_some(extra)}, which our model does not have"] if extra else []
    for name, shape in wanted.items():
        given = found.tensors[name].shape if name in found.tensors else shape
        shared = name.split(".")[-2] in ("q_norm", "k_norm") and grouped(given, shape)
        if given != shape and not shared:
            return [*faults, f"{name} has shape {given}, the recipe's model section has {shape}"]
    return faults


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    return ", ".join(listed[:_MOST]) + more


def grouped(given: Shape, shape: Shape) -> bool:
    """Whether a q or k norm can be expanded to `shape` [heads, d].

    It can from [d], and from [groups, d] with one row per group of consecutive heads.
    Lumina-mGPT's 34B has one norm for each of the eight shards that Chameleon was trained in.
    """
    rows = given[0] if len(given) == 2 else 1
    return len(given) in (1, 2) and given[-1] == shape[-1] and rows > 0 and shape[0] % rows == 0


def whole(tensor: Tensor, shape: Shape) -> Tensor:
    """The tensor in the given shape: a norm that several heads share is repeated for each of them."""
    if tuple(tensor.shape) == shape:
        return tensor
    # [d] or [groups, d] -> [groups, d] -> [heads, d]: each group of consecutive heads has the same norm
    rows = tensor.reshape(-1, shape[-1])
    return rows.repeat_interleave(shape[0] // len(rows), 0)


def image_faults(found: FoundImage, config: ImageTokenizerConfig, wanted: Mapping[str, Shape]) -> list[str]:
    """Every difference between an image tokenizer (or only its encoder) and the recipe's section image_tokenizer."""
    settings = [
        f"image_tokenizer.{key} {value!r} (recipe: {getattr(config, key)!r})"
        for key, value in found.settings.items()
        if getattr(config, key) != value
    ]
    names = [name for name in wanted if found.whole or not name.startswith("decoder.")]
    differing = [n for n in names if n not in found.tensors or found.tensors[n].shape != wanted[n]]
    extra = sorted(name for name in found.tensors if name not in wanted)
    faults = [*settings, *found.faults]
    if differing or extra:
        name = (differing or extra)[0]
        theirs = list(found.tensors[name].shape) if name in found.tensors else "none"
        ours = list(wanted[name]) if name in wanted else "none"
        count = f"{len(found.tensors)} tensors where the recipe's image_tokenizer section has {len(wanted)}"
        faults.append(f"{count}, {len(differing) + len(extra)} differ, first {name}: {theirs} (recipe: {ours})")
    return faults


def refuse(path: Path, what: str, config: RunConfig, faults: list[str]) -> None:
    """ValueError with all faults in one line, if there are any."""
    if faults:
        raise ValueError(f"{what} {path} does not fit recipe {config.name}: {'; '.join(faults)}")
