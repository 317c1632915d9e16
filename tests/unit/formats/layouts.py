"""Narrow models in the layouts of their publishers, and Meta's forward pass reimplemented from its formulas."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.export.hf_config import special_tokens
from realsr_hpc.vlcot.vocabulary import Vocabulary, build_vocabulary

LAYERS, HIDDEN, HEADS, FFN, EPSILON, THETA = 2, 48, 4, 64, 1e-5, 10000.0
WIDTH = HIDDEN // HEADS
NUM_TEXT = 90
SIZES = [
    f"model.num_layers={LAYERS}", f"model.hidden_size={HIDDEN}", f"model.num_heads={HEADS}",
    f"model.ffn_hidden_size={FFN}", "model.weights=null", "image_tokenizer.codebook_size=40",
    "image_tokenizer.base_channels=32", "image_tokenizer.latent_channels=24", "image_tokenizer.embed_dim=6",
    "image_tokenizer.downsample=4", "image_tokenizer.channel_multiplier=[1,2,2]", "image_tokenizer.num_res_blocks=1",
    "image_tokenizer.decoder_base_channels=null", "image_tokenizer.decoder_norm=true",
    "image_tokenizer.decoder_patch_out=false", "image_tokenizer.decoder_channel_multiplier=null",
    "image_tokenizer.decoder_output_shuffle=1", "model.max_sequence_tokens=4096",
    "image_tokenizer.weights=/nowhere/image.safetensors",
]  # fmt: skip


def overrides(*more: str) -> list[str]:
    """Overrides that describe the narrow shape."""
    return [
        "recipe=sft_tiny",
        "vlcot.vocabulary=tiny",
        "precision.params=fp32",
        "cluster.tasks_per_node=1",
        *SIZES,
        *more,
    ]


def recipe(*more: str) -> RunConfig:
    return compose_one(overrides(*more))


def layout(config: RunConfig, num_text: int = NUM_TEXT) -> Vocabulary:
    return build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, num_text)


def whole_names(config: RunConfig) -> dict[str, int]:
    """Name -> id of a complete vocabulary: codes, control tokens, and letters as text."""
    vocabulary = layout(config)
    text = {f"w{number}": vocabulary.text_first + number for number in range(NUM_TEXT)}
    return {**special_tokens(vocabulary), **text}


def write_tokenizer(path: Path, names: dict[str, int]) -> Path:
    tree = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": names, "merges": []}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


def meta_state(kv_heads: int = HEADS, vocab: int = 1024, parts: int = 1) -> list[dict[str, Tensor]]:
    """One shard per tensor-parallel rank, with names and shapes of Meta's `Transformer` and its own q and k norms."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.3) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    shared = {name: 1 + draw(HIDDEN) for layer in range(LAYERS) for name in _block_norms(layer)}
    shared["norm.weight"] = 1 + draw(HIDDEN)
    shards = []
    for _ in range(parts):
        shard = dict(shared)
        shard["tok_embeddings.weight"] = draw(vocab, HIDDEN // parts)
        shard["output.weight"] = draw(vocab // parts, HIDDEN)
        shard["rope.freqs"] = torch.zeros(WIDTH // 2)
        for layer in range(LAYERS):
            at = f"layers.{layer}."
            for name, rows in (("wq", HEADS), ("wk", kv_heads), ("wv", kv_heads)):
                shard[f"{at}attention.{name}.weight"] = draw(rows * WIDTH // parts, HIDDEN)
            shard[f"{at}attention.wo.weight"] = draw(HIDDEN, HIDDEN // parts)
            for side in "qk":
                shard[f"{at}attention.{side}_normalization.weight"] = 1 + draw(WIDTH)
                shard[f"{at}attention.{side}_normalization.bias"] = draw(WIDTH)
            for name in ("w1", "w3"):
                shard[f"{at}feed_forward.{name}.weight"] = draw(FFN // parts, HIDDEN)
            shard[f"{at}feed_forward.w2.weight"] = draw(HIDDEN, FFN // parts)
        shards.append(shard)
    return shards


def _block_norms(layer: int) -> list[str]:
    return [f"layers.{layer}.{name}.weight" for name in ("attention_norm", "ffn_norm")]


def fused(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """wq, wk, wv as one tensor, w1 and w3 as one."""
    kept = dict(shard)
    for layer in range(LAYERS):
        for inner, parts, whole in (("attention", ("wq", "wk", "wv"), "wqkv"), ("feed_forward", ("w1", "w3"), "w13")):
            names = [f"layers.{layer}.{inner}.{part}.weight" for part in parts]
            kept[f"layers.{layer}.{inner}.{whole}.weight"] = torch.cat([kept.pop(name) for name in names])
    return kept


def write_tree(
    root: Path, shards: list[dict[str, Any]], config: RunConfig, kv_heads: int | None = None, swin_norm: bool = False
) -> Path:
    """`models/7b`, `tokenizer/text_tokenizer.json` as Meta's download script leaves them."""
    folder = root / "models" / "7b"
    folder.mkdir(parents=True)
    model = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": kv_heads, "norm_eps": EPSILON}
    model |= {"rope_theta": THETA, "qk_normalization": True, "swin_norm": swin_norm, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({"model": model, "seed": 1}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": len(shards)}))
    for number, shard in enumerate(shards):
        name = "consolidated.pth" if len(shards) == 1 else f"consolidated.{number:02d}.pth"
        torch.save(shard, folder / name)
    write_tokenizer(root / "tokenizer" / "text_tokenizer.json", whole_names(config))
    return root


def meta_logits(
    shards: list[dict[str, Tensor]], tokens: Tensor, kv_heads: int = HEADS, swin_norm: bool = False
) -> Tensor:
    """[B, S, V] of a tree in float32: inference/transformer.py's arithmetic, rotary turns of neighbouring pairs."""
    hidden = torch.cat([shard["tok_embeddings.weight"][tokens] for shard in shards], -1)
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        attend = functools.partial(_attention, shards, f"{at}attention", kv_heads)
        for branch, norm in ((attend, "attention_norm"), (functools.partial(_mlp, shards, at), "ffn_norm")):
            weight = shards[0][f"{at}{norm}.weight"]
            hidden = hidden + (_rms(branch(hidden), weight) if swin_norm else branch(_rms(hidden, weight)))
    normed = _rms(hidden, shards[0]["norm.weight"])
    return torch.cat([normed @ shard["output.weight"].T for shard in shards], -1)


def _attention(shards: list[dict[str, Tensor]], at: str, kv_heads: int, x: Tensor) -> Tensor:
    (batch, length), total = x.shape[:2], torch.zeros_like(x)
    for shard in shards:
        q = _turned(_heads(x @ shard[f"{at}.wq.weight"].T, shard, f"{at}.q_normalization"))
        k = _turned(_heads(x @ shard[f"{at}.wk.weight"].T, shard, f"{at}.k_normalization"))
        v = (x @ shard[f"{at}.wv.weight"].T).view(batch, length, -1, WIDTH)
        k, v = (part.repeat_interleave(HEADS // kv_heads, 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / WIDTH**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, length, -1)
        total = total + mixed @ shard[f"{at}.wo.weight"].T
    return total


def _mlp(shards: list[dict[str, Tensor]], at: str, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for shard in shards:
        gate, up = (x @ shard[f"{at}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        total = total + (functional.silu(gate) * up) @ shard[f"{at}feed_forward.w2.weight"].T
    return total


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def _heads(x: Tensor, shard: dict[str, Tensor], norm: str) -> Tensor:
    rows = x.view(*x.shape[:2], -1, WIDTH)
    return functional.layer_norm(rows, (WIDTH,), shard[f"{norm}.weight"], shard[f"{norm}.bias"], 1e-5)


def _turned(x: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) as complex numbers, turned by position * theta^(-2i / d)."""
    angles = torch.arange(x.shape[1])[:, None] * THETA ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(-2)
