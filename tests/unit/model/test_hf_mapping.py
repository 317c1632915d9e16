"""The table that maps Hugging Face to Megatron, on tensors without a policy."""

from __future__ import annotations

import pytest
import torch

from realsr_hpc.config.schema import ModelConfig
from realsr_hpc.model.hf_mapping import (
    EMBEDDING,
    FINAL,
    LAYER,
    Row,
    WeightShapes,
    hf_names,
    hf_shape,
    merge,
    split,
)

SHAPES = WeightShapes.of(
    ModelConfig(num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=12), vocab_size=9
)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("row", [EMBEDDING, *LAYER, *FINAL], ids=lambda row: row.local.split("{i}.")[-1])
def test_split_undoes_merge(row: Row, tp_size: int) -> None:
    whole = [torch.randn(hf_shape(name, SHAPES)) for name in row.hf]
    shards = [merge(row, whole, SHAPES, tp_size, rank) for rank in range(tp_size)]
    back = split(row, shards, SHAPES)
    assert len(back) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(back, whole, strict=True))


def test_qkv_interleaves_by_group() -> None:
    """Megatron expects [q q k v] for each key-value head: rows of the first group come first."""
    row = next(row for row in LAYER if row.cut == "qkv")
    q, k, v = (torch.full((n, 16), float(i)) for i, n in enumerate((16, 8, 8)))
    merged = merge(row, [q, k, v], SHAPES, 1, 0)
    assert merged[:, 0].tolist() == ([0.0] * 8 + [1.0] * 4 + [2.0] * 4) * 2


def test_names_are_those_of_the_paper_and_unique() -> None:
    names = hf_names(SHAPES)
    assert len(names) == len(set(names)) == 2 * 13 + 3
    assert "model.layers.1.self_attn.k_norm.bias" in names
    assert hf_shape("model.layers.1.self_attn.k_norm.bias", SHAPES) == (2, 4)
    assert hf_shape("model.layers.0.post_attention_layernorm.weight", SHAPES) == (16,)


def test_seven_b_has_its_published_number_of_parameters() -> None:
    model = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008)
    shapes = WeightShapes.of(model, 65536)
    total = sum(torch.Size(hf_shape(name, shapes)).numel() for name in hf_names(shapes))
    shared_norms = 32 * 4 * (32 - 1) * 128  # the published count has one q and k norm for all heads of a layer
    assert total - shared_norms == 7_013_158_912
