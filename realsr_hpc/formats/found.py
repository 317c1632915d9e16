"""The result of opening files in a format: tensors under our names, read one by one, and the model's settings.

A policy's tensors have Hugging Face's names, with queries and keys in the order of rotary halves. An image tokenizer's
have those of `tokenizer/image.py`, which are taming-transformers'. Nothing is in memory until it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
VQ_PREFIX = "model.vqmodel."


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor that was not read yet."""

    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class FoundPolicy:
    """A language model as a format found it."""

    format: str
    path: Path
    tensors: Mapping[str, Spec]
    """By Hugging Face's names; those of an image tokenizer inside stand in `FoundImage`."""
    read: Callable[[str], Tensor]
    sizes: Mapping[str, float]
    """Under the names of config.json: vocab_size, hidden_size, ... , rms_norm_eps, rope_theta."""
    rotary: str
    """How queries and keys lay in the file, and how that is known."""
    names: Mapping[str, int] | None = None
    """Token names and ids that the weights themselves come with (config.json's vocabulary_map)."""
    faults: tuple[str, ...] = ()
    """Settings and tensors that our forward pass has no place for."""
    left: tuple[str, ...] = ()
    """What is in the files and not read, and why that changes nothing."""

    @property
    def parameters(self) -> int:
        """Numbers in all tensors, as the files hold them."""
        return sum(spec.numel for spec in self.tensors.values())


@dataclass(frozen=True)
class FoundImage:
    """An image tokenizer, or its encoder alone, as a format found it."""

    format: str
    path: Path
    tensors: Mapping[str, Spec]
    read: Callable[[str], Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe's image_tokenizer section that the file decides."""
    faults: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the decoder is there."""
        return any(name.startswith("decoder.") for name in self.tensors)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(spec.numel for spec in self.tensors.values())


@dataclass(frozen=True)
class Found:
    """All that one source gives."""

    format: str
    policy: FoundPolicy | None = None
    image: FoundImage | None = None
    text: Path | None = None
    """The text tokenizer's file."""
    recipe: Path | None = None
    """A recipe beside the weights: an export of ours."""


def finite(name: str, tensor: Tensor, path: Path) -> Tensor:
    """The tensor itself. ValueError naming it where it holds NaN or infinities."""
    if tensor.numel() and tensor.is_floating_point():
        low, high = torch.aminmax(tensor)
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers; the file is damaged, copy it again")
    return tensor
