"""Arithmetic of a layout."""

from __future__ import annotations

from typing import Any

import pytest

from realsr_hpc.config.schema import ModelConfig, ParallelConfig, RunConfig
from realsr_hpc.parallel import layout


def test_data_parallelism_is_what_the_world_leaves() -> None:
    found = layout.layout_of(ParallelConfig(tp=2, pp=4), 24)
    assert (found.tp_size, found.pp_size, found.dp_size, found.world_size) == (2, 4, 3, 24)


def test_world_that_tp_and_pp_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"world size 6 .* 2 x 2: start a multiple of 4 processes"):
        layout.layout_of(ParallelConfig(tp=2, pp=2), 6)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({"num_layers": 5}, {"pp": 2}, r"must divide model\.num_layers 5"),
        ({"num_heads": 6, "hidden_size": 96}, {"tp": 4}, r"model\.num_heads: 6: must be divisible by parallel\.tp 4"),
        ({"num_kv_heads": 1}, {"tp": 2}, r"model\.num_kv_heads: 1: must"),
        ({"num_kv_heads": 3}, {}, r"model\.num_kv_heads: 3: must divide num_heads"),
        ({"ffn_hidden_size": 99}, {"tp": 2}, r"model\.ffn_hidden_size: 99: must"),
        ({"num_heads": 7}, {}, r"model\.num_heads: 7: hidden_size 256 must be divisible"),
        ({"hidden_size": 36, "num_heads": 4}, {}, r"must be divisible by twice as many"),
        ({}, {"virtual_pp": 2}, r"needs parallel\.pp >= 2"),
        ({}, {"sequence_parallel": True}, r"needs parallel\.tp >= 2"),
    ],
)
def test_what_does_not_fit_is_named(model: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(RunConfig(name="x", task="grpo", model=ModelConfig(**model), parallel=ParallelConfig(**parallel)))


def test_what_fits_passes() -> None:
    seven_b = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008)
    parallel = ParallelConfig(tp=8, pp=4, virtual_pp=2, sequence_parallel=True)
    layout.check(RunConfig(name="x", task="grpo", model=seven_b, parallel=parallel))


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(1030, 1, 1030), (1030, 4, 1032), (1032, 4, 1032), (1, 8, 8)])
def test_vocabulary_is_padded_to_the_next_multiple(vocab: int, tp: int, padded: int) -> None:
    assert layout.padded_vocab(vocab, tp) == padded


def test_multiples_of_lengths_and_microbatches() -> None:
    assert layout.row_multiple(ParallelConfig(tp=4)) == 16
    assert layout.row_multiple(ParallelConfig(tp=4, sequence_parallel=True)) == 64
    assert layout.microbatch_multiple(ParallelConfig(pp=4)) == 1
    assert layout.microbatch_multiple(ParallelConfig(pp=4, virtual_pp=2)) == 4


@pytest.mark.parametrize(
    ("count", "most", "multiple", "expected"),
    [
        (16, 7, 1, (3, 6)),
        (16, 5, 1, (4, 4)),
        (5, 4, 1, (2, 3)),
        (3, 4, 1, (1, 3)),
        (0, 4, 2, (2, 1)),
        (9, 2, 4, (8, 2)),
    ],
)
def test_parts_are_even(count: int, most: int, multiple: int, expected: tuple[int, int]) -> None:
    assert layout.even_parts(count, most, multiple) == expected
