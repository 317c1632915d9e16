"""The keywords of Megatron for each number format."""

from __future__ import annotations

import pytest
import torch

from realsr_hpc.config.schema import PrecisionConfig
from realsr_hpc.model import precision
from realsr_hpc.parallel import backend


def test_bf16_sets_every_field() -> None:
    arguments = precision.precision_arguments(PrecisionConfig(params="bf16"), num_layers=4)
    assert arguments == {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}


def test_fp8_without_transformer_engine_is_refused() -> None:
    if backend.has_transformer_engine():
        assert precision.precision_arguments(PrecisionConfig(params="bf16", fp8="tensorwise"), 4)["fp8"] == "hybrid"
        return
    with pytest.raises(ValueError, match=r"precision\.fp8 = 'tensorwise' needs CUDA and Transformer Engine"):
        precision.precision_arguments(PrecisionConfig(params="bf16", fp8="tensorwise"), num_layers=4)


def test_fp8_keeps_the_ends_in_bf16_where_the_recipe_can() -> None:
    kept = precision.fp8_arguments(PrecisionConfig(fp8="blockwise"), num_layers=4)
    assert (kept["fp8"], kept["fp8_recipe"], kept["first_last_layers_bf16"]) == ("hybrid", "blockwise", True)
    assert kept["num_layers_at_start_in_bf16"] == kept["num_layers_at_end_in_bf16"] == 1
    assert not precision.fp8_arguments(PrecisionConfig(fp8="delayed"), num_layers=4)["first_last_layers_bf16"]
    assert not precision.fp8_arguments(PrecisionConfig(fp8="tensorwise"), num_layers=2)["first_last_layers_bf16"]


def test_megatron_accepts_the_fp8_keywords() -> None:
    """Megatron takes the keywords without Transformer Engine too (and then ignores them, hence our refusal)."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    arguments = precision.fp8_arguments(PrecisionConfig(fp8="blockwise"), num_layers=4)
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **arguments)
    assert config.fp8_recipe == "blockwise"
