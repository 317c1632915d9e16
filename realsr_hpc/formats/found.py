"""The records that every format returns: tensors under our names, and the settings of the model.

A policy's tensors have Hugging Face's names, with the rows of queries and keys in the order of rotary halves. An image
tokenizer's tensors have the names of `tokenizer/image.py`, which are taming-transformers'. A tensor is loaded when
`read` is called, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc.files import Json

Shape = tuple[int, ...]
VQ_PREFIX = "model.vqmodel."


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor that has not been read yet."""

    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class FoundPolicy:
    """A policy (language model) in a published format."""

    format: str
    path: Path
    tensors: Mapping[str, Spec]
    """Tensors by Hugging Face's names. If the folder also has an image tokenizer, its tensors are in `FoundImage`."""
    read: Callable[[str], Tensor]
    sizes: Mapping[str, float]
    """Sizes and constants under config.json's names: vocab_size, hidden_size, ..., rms_norm_eps, rope_theta."""
    rotary: str
    """Order of the rotary pairs of queries and keys in the file, and the evidence for it."""
    names: Mapping[str, int] | None = None
    """Token names and ids in config.json (vocabulary_map)."""
    faults: tuple[str, ...] = ()
    """Settings and tensors that our forward pass does not support."""
    left: tuple[str, ...] = ()
    """Tensors in the files that are not read, each with the reason why the model does not need it."""

    @property
    def parameters(self) -> int:
        """Number of parameters in the files."""
        return sum(spec.numel for spec in self.tensors.values())


@dataclass(frozen=True)
class FoundImage:
    """An image tokenizer, or only its encoder, in a published format."""

    format: str
    path: Path
    tensors: Mapping[str, Spec]
    read: Callable[[str], Tensor]
    settings: Mapping[str, Json] = field(default_factory=dict)
    """Fields of the recipe's section image_tokenizer that this file determines."""
    faults: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it has a decoder."""
        return any(name.startswith("decoder.") for name in self.tensors)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(spec.numel for spec in self.tensors.values())


@dataclass(frozen=True)
class Found:
    """Everything that one source contains."""

    format: str
    policy: FoundPolicy | None = None
    image: FoundImage | None = None
    text: Path | None = None
    """The text tokenizer's file."""
    recipe: Path | None = None
    """The recipe beside the weights, which only our own exports have."""


def finite(name: str, tensor: Tensor, path: Path) -> Tensor:
    """Return the tensor. ValueError, naming it, if it contains NaN or infinities."""
    if tensor.numel() and tensor.is_floating_point():
        low, high = torch.aminmax(tensor)
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers; the file is damaged, copy it again")
    return tensor
