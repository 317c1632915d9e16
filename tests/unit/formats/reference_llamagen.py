"""LlamaGen's image tokenizer from its formulas: functions over tensors under its published names, nothing of ours.

Residual blocks of GroupNorm (32 groups, 1e-6), x * sigmoid(x) and 3x3 convolutions; attention behind each block of the
lowest resolution and in the middle; downsampling with a pad at right and below; codes and features as unit vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]


def random_state(multipliers: list[int], codes: int, width: int, latent: int, features: int, blocks: int) -> State:
    """Random weights of a narrow `VQModel`: every name and shape follows from the published class."""
    generator = torch.Generator().manual_seed(3)
    state: State = {}

    def conv(name: str, out: int, given: int, side: int) -> None:
        scale = (given * side**2) ** -0.5
        state[f"{name}.weight"] = torch.randn(out, given, side, side, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(channels, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.1

    def residual(name: str, given: int, out: int) -> None:
        norm(f"{name}.norm1", given), conv(f"{name}.conv1", out, given, 3)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out, 3)
        if given != out:
            conv(f"{name}.nin_shortcut", out, given, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name: str, channels: int) -> None:
        residual(f"{name}.0", channels, channels), attention(f"{name}.1", channels)
        residual(f"{name}.2", channels, channels)

    last, given = len(multipliers) - 1, width
    conv("encoder.conv_in", width, 3, 3)
    for level, multiplier in enumerate(multipliers):
        for block in range(blocks):
            residual(f"encoder.conv_blocks.{level}.res.{block}", given, width * multiplier)
            given = width * multiplier
            if level == last:
                attention(f"encoder.conv_blocks.{level}.attn.{block}", given)
        if level != last:
            conv(f"encoder.conv_blocks.{level}.downsample.conv", given, given, 3)
    middle("encoder.mid", given), norm("encoder.norm_out", given), conv("encoder.conv_out", latent, given, 3)
    conv("decoder.conv_in", given, latent, 3), middle("decoder.mid", given)
    for place, multiplier in enumerate(reversed(multipliers)):
        for block in range(blocks + 1):
            residual(f"decoder.conv_blocks.{place}.res.{block}", given, width * multiplier)
            given = width * multiplier
            if place == 0:
                attention(f"decoder.conv_blocks.{place}.attn.{block}", given)
        if place != last:
            conv(f"decoder.conv_blocks.{place}.upsample.conv", given, given, 3)
    norm("decoder.norm_out", given), conv("decoder.conv_out", 3, given, 3)
    conv("quant_conv", features, latent, 1), conv("post_quant_conv", latent, features, 1)
    state["quantize.embedding.weight"] = torch.randn(codes, features, generator=generator)
    return state


def _conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return functional.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def _residual(state: State, name: str, x: Tensor) -> Tensor:
    branch = x
    for number in (1, 2):
        normed = _norm(state, f"{name}.norm{number}", branch)
        branch = _conv(state, f"{name}.conv{number}", normed * normed.sigmoid(), padding=1)
    return branch + (_conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def _attention(state: State, name: str, x: Tensor) -> Tensor:
    normed = _norm(state, f"{name}.norm", x)
    q, k, v = (_conv(state, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    weights = (torch.einsum("bcq,bck->bqk", q, k) / x.shape[1] ** 0.5).softmax(-1)
    mixed = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
    return x + _conv(state, f"{name}.proj_out", mixed)


def _blocks(state: State, name: str, x: Tensor) -> Tensor:
    block = 0
    while f"{name}.res.{block}.conv1.weight" in state:
        x = _residual(state, f"{name}.res.{block}", x)
        if f"{name}.attn.{block}.q.weight" in state:
            x = _attention(state, f"{name}.attn.{block}", x)
        block += 1
    return x


def _middle(state: State, name: str, x: Tensor) -> Tensor:
    return _residual(state, f"{name}.2", _attention(state, f"{name}.1", _residual(state, f"{name}.0", x)))


def _levels(state: State, side: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{side}.conv_blocks.")})


def features(state: State, images: Tensor) -> Tensor:
    """Unit vectors [B, E, h, w]."""
    x = _conv(state, "encoder.conv_in", images, padding=1)
    for level in range(_levels(state, "encoder")):
        at = f"encoder.conv_blocks.{level}"
        x = _blocks(state, at, x)
        if f"{at}.downsample.conv.weight" in state:
            x = _conv(state, f"{at}.downsample.conv", functional.pad(x, (0, 1, 0, 1)), stride=2)
    normed = _norm(state, "encoder.norm_out", _middle(state, "encoder.mid", x))
    x = _conv(state, "quant_conv", _conv(state, "encoder.conv_out", normed * normed.sigmoid(), padding=1))
    return x / x.norm(dim=1, keepdim=True)


def unit_codes(state: State) -> Tensor:
    """The codebook [K, E] as it is compared and decoded."""
    codes = state["quantize.embedding.weight"]
    return codes / codes.norm(dim=1, keepdim=True)


def encode(state: State, images: Tensor) -> Tensor:
    """Codes [B, h, w]: the nearest unit vector."""
    return torch.einsum("behw,ke->bhwk", features(state, images), unit_codes(state)).argmax(-1)


def decode(state: State, vectors: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] of code vectors [B, E, h, w], not clamped."""
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", vectors), padding=1)
    x = _middle(state, "decoder.mid", x)
    for place in range(_levels(state, "decoder")):
        at = f"decoder.conv_blocks.{place}"
        x = _blocks(state, at, x)
        if f"{at}.upsample.conv.weight" in state:
            doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = _conv(state, f"{at}.upsample.conv", doubled, padding=1)
    normed = _norm(state, "decoder.norm_out", x)
    return _conv(state, "decoder.conv_out", normed * normed.sigmoid(), padding=1)
